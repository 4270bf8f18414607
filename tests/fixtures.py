"""Fixtures of the tests of the examples."""

import numpy as np
import pytest
from test_data import write_parquet


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder of a data set of 200 training and 20 test images whose class is their brightness, roughly."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 20)):
        y = rng.permutation(np.arange(count) % 10)
        x = (25 * y[:, None, None, None] + rng.integers(0, 30, (count, 32, 32, 3))).astype(np.uint8)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", x, y)
    return str(folder)
