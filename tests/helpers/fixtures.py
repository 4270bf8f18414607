"""Small data sets, and the tables that a command prints."""

import io
import runpy
import sys

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


@pytest.fixture
def tables(monkeypatch, capsys):
    """Runs a module; its printed tables as rows of cells, and all that it printed."""

    def run(module, arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
        runpy.run_module(module, run_name="__main__")
        printed = capsys.readouterr().out
        cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
        return {row[0].strip(): [c.strip() for c in row[1:]] for row in cells}, printed

    return run
