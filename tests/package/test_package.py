"""What is public, what a wheel holds, and that the README's first snippet runs from it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparta_act

ROOT = Path(__file__).parents[2]
ORDER = ["errors", "functional", "activations", "surgery", "pretrained", "__init__"]
PARTS = {
    "surgery": {
        "checking",
        "grouping",
        "naming",
        "selection",
        "sites",
        "trial",
        "recording",
        "rewriting",
        "discovery",
        "unseen",
        "verifying",
    }
}
PARTS |= {"pretrained": {"shipped", "card", "files", "sources"}}


def imported(name):
    tree = ast.parse((ROOT / "sparta_act" / f"{name}.py").read_text())
    typing = {n for i in tree.body if isinstance(i, ast.If) for n in ast.walk(i)}  # if TYPE_CHECKING
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n not in typing]
    modules = {n.module for n in nodes if n.module and n.module.startswith("sparta_act")}
    modules |= {f"sparta_act.{a.name}" for n in nodes if n.module == "sparta_act" for a in n.names}
    return {m.removeprefix("sparta_act").removeprefix(".") for m in modules} - {""}


def test_the_public_names():
    assert sparta_act.__all__ == [
        "Sparta",
        "SpartaError",
        "SpartaSet",
        "SwishReLU",
        "relu_sites",
        "replace_relus",
        "restore_relus",
    ]


def test_imports_run_one_way():
    found = {p.stem for p in (ROOT / "sparta_act").glob("*.py")}
    assert found == {*ORDER, *PARTS["surgery"], *PARTS["pretrained"]}
    below = set()
    for name in ORDER:
        parts = PARTS.get(name, set())
        for part in (*parts, name):
            assert imported(part) <= below | parts, part
        below |= {name} if name != "surgery" else set()  # `pretrained` does not know `surgery`
        if name == "pretrained":
            below |= {"surgery"}


@pytest.mark.slow
def test_a_wheel_has_the_weights_and_runs_the_first_snippet(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "sparta_act", checkout / "sparta_act")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    small = checkout / "sparta_act/sets/cifar10-resnet18-w16"
    for name in ("cifar10-resnet18", "cifar10-resnet34"):  # of these the first goes into the wheel
        if not (small.parent / name).exists():
            shutil.copytree(small, small.parent / name)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, checkout], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sets = {n.removeprefix("sparta_act/sets/") for n in names if n.startswith("sparta_act/sets/")}
    files = ("model.safetensors", "config.json", "README.md")
    assert sets == {f"{s}/{f}" for s in ("cifar10-resnet18-w16", "cifar10-resnet18") for f in files}
    assert sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist()) < 60e6
    assert "sparta_act/py.typed" in names
    assert not [n for n in names if n.startswith(("examples", "tests"))]
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    program = f"import models\nmy_resnet = models.ResNet18(width=16)\n{snippet}"
    program += "import sparta_act\nprint(sparta_act.__file__, my_resnet.layer4[1].act2)"
    paths = os.pathsep.join([str(site), str(ROOT / "examples")])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(str(site))
    assert re.search(r" Sparta\(128, hidden=.*, frozen; conv1 ", run.stdout)
