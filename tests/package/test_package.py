"""What is public, what a wheel holds, and that the README's first snippet runs from it."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ["errors", "functional", "activations", {"surgery", "pretrained"}, "__init__", "__main__"]
LABORATORY = [
    "common",
    "attacks",
    "training",
    "evaluation",
    "audit",
    "maskers",
    "controls",
    "results",
    "pictures",
    "benchmarks",
]


def imported(path):
    """The modules that a file imports, and `module.name` of each name; not those for type checkers."""
    tree = ast.parse(path.read_text())
    typing = {n for i in tree.body if isinstance(i, ast.If) for n in ast.walk(i)}  # if TYPE_CHECKING
    nodes = [n for n in ast.walk(tree) if n not in typing]
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in nodes), f"{path}: a relative import"
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
        found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def parts_of(modules, package):
    """What of a package is named: "surgery" for `package.surgery.sites`."""
    return {m.removeprefix(f"{package}.").split(".")[0] for m in modules if m.startswith(f"{package}.")}


def files_of(folder):
    """Python files by the part of the folder that they are in: a room, or themselves."""
    parts = {p.stem if p.is_file() else p.name: p for p in folder.iterdir()}
    files = {name: [p] if p.suffix == ".py" else [*p.rglob("*.py")] for name, p in parts.items()}
    return {name: paths for name, paths in files.items() if paths}


def test_imports_of_the_package_run_one_way():
    files, below = files_of(ROOT / "sparta_act"), set()
    assert files.keys() == set().union(*(p if isinstance(p, set) else {p} for p in PACKAGE))
    for level in PACKAGE:
        here = level if isinstance(level, set) else {level}
        for part in here:
            for path in files[part]:
                above = (parts_of(imported(path), "sparta_act") & files.keys()) - below - {part}
                assert not above, f"{path} imports {above}"
        below |= here


def test_outside_a_room_only_what_it_offers_is_imported():
    rooms = [p.parent for p in (ROOT / "sparta_act").glob("*/__init__.py")]
    assert {room.name for room in rooms} == {"surgery", "pretrained"}
    for room in rooms:
        offered = importlib.import_module(f"sparta_act.{room.name}").__all__
        allowed = {f"sparta_act.{room.name}", *(f"sparta_act.{room.name}.{name}" for name in offered)}
        for path in (p for p in (ROOT / "sparta_act").rglob("*.py") if room not in p.parents):
            inside = {m for m in imported(path) if m.startswith(f"sparta_act.{room.name}")}
            assert inside <= allowed, path


def test_imports_of_the_laboratory_run_one_way():
    files = files_of(ROOT / "examples/paper")
    assert files.keys() == {*LABORATORY, "__init__", "__main__"}
    for i, room in enumerate(LABORATORY):
        for path in files[room]:
            above = parts_of(imported(path), "examples.paper") - {*LABORATORY[: i + 1]}
            assert not above, f"{path} imports {above}"


def test_the_examples_need_no_laboratory():
    for path in (ROOT / "examples").glob("*.py"):
        assert not {m for m in imported(path) if m.startswith("examples.paper")}, path


def test_importing_the_package_does_not_import_the_client_of_the_hub():
    program = "import sys, sparta_act; print([m for m in sys.modules if m.startswith('huggingface_hub')])"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout == "[]\n"


TYPED = """
from torch import nn
from sparta_act import Sparta, SpartaSet, SwishReLU, list_sets

activations: SpartaSet = Sparta.from_pretrained("name", revision="main", local_files_only=True)
mine: SpartaSet = SpartaSet.of(nn.Sequential(SwishReLU(inplace=True)), {"license": "mit"})
clean: list[float] = [known.clean for known in list_sets()]
Sparta.from_pretrained("name", revison="main")
mine.no_such_name
"""


@pytest.mark.slow
def test_type_checkers_see_the_public_names_and_their_arguments(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(TYPED)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", tmp_path / "user.py"],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    wrong = [line.split("error: ")[1] for line in run.stdout.splitlines() if "error: " in line]
    assert [line.split("; ")[0] for line in wrong] == [
        'Unexpected keyword argument "revison"',
        '"SpartaSet" has no attribute "no_such_name"  [attr-defined]',
    ]


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
    assert {"sparta_act/py.typed", "sparta_act/pretrained/shipped.json"} <= names
    assert not [n for n in names if n.startswith(("examples", "tests"))]
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    program = f"import models\nmy_resnet = models.ResNet18()\n{snippet}"
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
    assert re.search(r" Sparta\(512, hidden=.*, frozen; conv1 ", run.stdout)
