"""Cut the sample next to this file from the whole CIFAR-10: `python examples/data/make_sample.py FOLDER`.

FOLDER holds the data set's parquet files (`train-*.parquet`, `test-*.parquet`), their rows in random order.
Takes the first images of each class; the PNG bytes stay as they are.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PER_CLASS = {"train": 200, "test": 50}


def main(folder: str) -> None:
    """Write cifar10-sample.parquet."""
    tables = []
    for split, count in PER_CLASS.items():
        files = sorted(Path(folder).rglob(f"{split}-*.parquet"))
        table = pa.concat_tables([pq.read_table(f, columns=["img", "label"]) for f in files])
        left = dict.fromkeys(range(10), count)
        rows = []
        for row, label in enumerate(table["label"].to_pylist()):
            if left[label]:
                left[label] -= 1
                rows.append(row)
        table = table.take(rows)
        tables.append(table.append_column("split", pa.array([split] * len(rows))))
    pq.write_table(
        pa.concat_tables(tables), Path(__file__).with_name("cifar10-sample.parquet"), compression="zstd"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
