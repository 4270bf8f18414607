"""Small data sets for tests of the laboratory."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def write_parquet(path, x, y, column="img"):
    """Write images (N, H, W, 3) uint8 in the layout of the Hub."""
    rows = []
    for image in x:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": "x.png"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows, "label": pa.array(y, pa.int64())}), path)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder of a data set: 200 training and 20 test images, whose brightness roughly tells their class."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 20)):
        y = rng.permutation(np.arange(count) % 10)
        x = (25 * y[:, None, None, None] + rng.integers(0, 30, (count, 32, 32, 3))).astype(np.uint8)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", x, y)
    return str(folder)
