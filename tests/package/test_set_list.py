"""What is published and where: `list_sets` and `python -m sparta_act`."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparta_act
from sparta_act import list_sets
from sparta_act.pretrained import hub
from sparta_act.pretrained.hub import SETS, SHIPPED

PACKAGE = Path(sparta_act.__file__).parent
NAME = "cifar10-resnet18-w16"


def test_the_list_shows_every_set_and_what_its_configuration_says():
    assert [s.name for s in list_sets()] == list(SHIPPED)
    for known in list_sets():
        if not (SETS / known.name).is_dir():
            continue
        config = json.loads((SETS / known.name / "config.json").read_bytes())
        assert known.channels == {label: site["in_channels"] for label, site in config["sites"].items()}
        assert known.dataset == config["info"]["dataset"]
        rows = {row["error"]: row for row in config["info"]["measured"]}
        for attack, *errors in (
            ("clean", known.clean, known.relu_clean, known.half_clean),
            (f"worst case, {known.eps}", known.worst_case, known.relu_worst_case, known.half_worst_case),
        ):
            for column, error in zip(("SPARTA", "ReLU twin", "ReLU times one half"), errors, strict=True):
                assert rows[attack][column].startswith(f"{error}% (")
        assert rows[attack]["images"] == str(known.images)


def test_the_page_on_sets_shows_the_list():
    page = (PACKAGE.parent / "docs/pretrained.md").read_text()
    assert f"```text\n{list_sets()!r}\n```" in page


def test_a_set_without_a_twin_and_one_that_is_on_the_hub(monkeypatch, tmp_path):
    lonely = hub.PUBLISHED[NAME] | dict.fromkeys(
        ("relu_clean", "relu_worst_case", "half_clean", "half_worst_case")
    )
    monkeypatch.setitem(hub.PUBLISHED, "lonely", lonely)
    last = list_sets()[-1]
    assert (last.name, last.where) == ("lonely", "on the Hub")
    shown = repr(list_sets()).splitlines()[-1].split("cifar10")[1]
    assert re.split(" {2,}", shown.strip()) == ["37.5%", "68.7% at 8/255, 2,000 images", "on the Hub"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.clean = 0.0


def command(*words, package=PACKAGE, **variables):
    return subprocess.run(
        [sys.executable, "-m", "sparta_act", *words],
        env=os.environ | {"PYTHONPATH": str(package.parent), "HF_HUB_OFFLINE": "1"} | variables,
        cwd=package.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command_shows_versions_and_sets():
    run = command()
    assert (run.returncode, run.stderr) == (0, "")
    head, table, files = run.stdout.strip().split("\n\n")
    versions = dict(line.split(maxsplit=1) for line in head.splitlines())
    assert list(versions) == ["sparta-act", "Python", "torch", "numpy", "safetensors", "huggingface-hub"]
    assert versions["sparta-act"] == f"{sparta_act.__version__} in {PACKAGE}"
    assert "not installed" not in head
    assert table == repr(list_sets())
    assert f"{NAME}: in {SETS / NAME}, sha256 as published" in files.splitlines()


@pytest.fixture
def copied(tmp_path):
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "sparta_act", ignore=shutil.ignore_patterns("__pycache__"))
    )


@pytest.mark.slow
def test_the_command_finds_a_changed_file(copied):
    (copied / "sets" / NAME / "config.json").write_text("{}")
    run = command(package=copied)
    assert run.returncode == 1
    assert (
        f"{NAME}: it does not hold {NAME!r} as sparta-act made it: config.json missing or changed"
        in run.stdout
    )


@pytest.mark.slow
def test_the_command_looks_into_the_cache_of_the_hub(copied, tmp_path):
    home = {"HF_HOME": str(tmp_path / "home")}
    at = tmp_path / f"home/hub/models--sparta-act--{NAME}"
    (at / "snapshots").mkdir(parents=True)
    shutil.move(copied / "sets" / NAME, tmp_path / "set")
    run = command(package=copied, **home)
    assert (run.returncode, f"{NAME}: not downloaded yet" in run.stdout) == (0, True)
    folder = shutil.move(tmp_path / "set", at / "snapshots" / ("0" * 40))
    (at / "refs").mkdir()
    (at / "refs/main").write_text("0" * 40)
    run = command(package=copied, **home)
    assert (run.returncode, f"{NAME}: downloaded to {folder}, sha256 as published" in run.stdout) == (0, True)
    with open(Path(folder) / "model.safetensors", "ab") as file:
        file.write(b"0")
    run = command(package=copied, **home)
    assert (run.returncode, "model.safetensors missing or changed" in run.stdout) == (1, True)
