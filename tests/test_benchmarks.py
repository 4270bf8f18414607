import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_epoch_benchmark_times_each_network(monkeypatch, capsys):
    small = "--width 8 --batch-size 4 --batches 1 --steps 1 --device cpu --activation relu sparta-pooled"
    monkeypatch.setattr(sys, "argv", ["epoch.py", *small.split()])
    runpy.run_path(str(FOLDER / "epoch.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "times relu" in printed
    rows = [line.split("│")[1:4] for line in printed.splitlines() if line.startswith("│")]
    assert [r[0].strip() for r in rows] == ["relu, none", "sparta-pooled, none"]
    assert all(float(r[1]) > 0 for r in rows)
    assert float(rows[0][2]) == 1.0
