"""That `on_device.py` passes: by itself, since torch takes no new device after its first backward pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import stand_in


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and not stand_in.is_possible(),
    reason="this torch can have no device that is written in Python",
)
def test_all_that_takes_a_device():
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    file = Path(__file__).with_name("on_device.py")
    run = subprocess.run([*pytest_here, file], capture_output=True, text=True, cwd=file.parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
