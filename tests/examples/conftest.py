import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("pgd", "models", "data", "adversarial_training", "quickstart")


@pytest.fixture
def example(monkeypatch):
    """Imports a file of examples/ by its plain name, as its neighbors do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in FILES:
        sys.modules.pop(name, None)
