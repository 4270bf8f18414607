"""The tutorial runs, and prints what it shows."""

import json
import re
import tempfile
from pathlib import Path

import pytest

from tests.helpers.notebook import code_cells, printed, stored

TUTORIAL = json.loads((Path(__file__).parents[2] / "docs/tutorial.ipynb").read_text())
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    """Word for word. Another machine or torch has other errors, by a few points."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cell, text in zip(code_cells(TUTORIAL), printed(TUTORIAL), strict=True):
        assert NUMBER.sub("#", text) == NUMBER.sub("#", stored(cell))
        shown = [float(number) for number in re.findall(r"(\d+)%", stored(cell))]
        assert [float(number) for number in re.findall(r"(\d+)%", text)] == pytest.approx(shown, abs=20)
