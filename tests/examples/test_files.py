"""Each file alone, in an empty folder with the neighbors that examples/README.md names for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparta_act import Sparta
from tests.examples.conftest import EXAMPLES

ROOT = EXAMPLES.parent
ALONE = """
import runpy, sys
for name in ("pgd", "models", "data"):  # run_path puts no folder on the path: they have no neighbors
    runpy.run_path(f"{sys.argv[1]}/{name}.py")
print(sorted({"examples", "torchvision", "timm", "accelerate"} & {n.partition(".")[0] for n in sys.modules}))
"""
QUICKSTART = """
import sys
import data
read = data.read_cifar
data.read_cifar = lambda split: tuple(t[:8] for t in read(split))  # few images, for the time
import quickstart
quickstart.STEPS = (0, 1)
quickstart.main()
print(sorted(n for n in sys.modules if n.partition(".")[0] in ("examples", "torchvision", "timm")))
"""
OWN = """
import sys
import benchmarks.peers  # torchvision can be imported after it
import adversarial_training
options = sys.argv[1:]
for network in ("torchvision/resnet18", "timm/resnet10t"):
    sys.argv[1:] = [*options, "--network", network, "--out", network.replace("/", "-")]
    adversarial_training.main()
print(sorted(n for n in sys.modules if n.partition(".")[0] == "examples"))
"""


def run(*arguments, cwd, folder=ROOT):
    """What a Python of its own prints, with `folder` on its path, and the repository for `sparta_act`."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def copied(folder, *names):
    folder.mkdir()
    for name in names:
        (shutil.copytree if (EXAMPLES / name).is_dir() else shutil.copy)(EXAMPLES / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of a few pictures of different sizes: the class is the color."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40 + i, 50, 3)).astype(np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_the_files_without_neighbors(tmp_path):
    folder = copied(tmp_path / "copy", "pgd.py", "models.py", "data.py")
    assert run("-c", ALONE, folder, cwd=tmp_path) == "[]\n"


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    folder = copied(tmp_path / "copy", "quickstart.py", "pgd.py", "models.py", "data.py", "data", "networks")
    *printed, imported = run("-c", QUICKSTART, cwd=tmp_path, folder=folder).splitlines()
    assert imported == "[]"
    assert "11,962,240 parameters, 11,220,132 of them train" in printed
    wrong = r"\d of 8 wrong \(\d+\.\d%\)"
    for name in ("ReLU", "SPARTA"):
        assert re.search(rf"^{name}: clean {wrong}; PGD-10 at 8/255 {wrong}$", "\n".join(printed), re.M)
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_folder_of_own_images_and_networks_of_torchvision_and_timm(own, tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    folder = copied(tmp_path / "copy", "adversarial_training.py", "pgd.py", "models.py", "data.py")
    options = ("--data", own, "--size", 32, "--epochs", 1, "--batch-size", 9)
    printed = run("-c", OWN, *options, cwd=tmp_path, folder=folder).splitlines()
    assert printed.pop() == "[]"
    assert len(re.findall(r"test images: clean \d of 6 wrong; PGD-10 \d of 6 wrong", "\n".join(printed))) == 2
    for name, sites in (("torchvision-resnet18", "G{}.B2"), ("timm-resnet10t", "G{}.B1")):
        activations = Sparta.from_pretrained(tmp_path / name / "set")
        assert [*activations] == [sites.format(i) for i in (1, 2, 3, 4)]


def test_the_readme_names_each_file():
    text = Path(EXAMPLES / "README.md").read_text()
    for name in EXAMPLES.glob("*.py"):
        assert name.name == "__init__.py" or f"`{name.name}`" in text
