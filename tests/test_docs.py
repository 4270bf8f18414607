"""What the documentation shows is what happens."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_surgery_page():
    pytest.importorskip("torchvision")
    failed, tried = doctest.testfile(str(DOCS / "surgery.md"), module_relative=False)
    assert (failed, tried > 15) == (0, True)
