"""Damaged checkpoints are refused; what loads is what was saved."""

import io
import os
import random
from dataclasses import replace

import pytest
import torch

from examples.paper.common.models import build
from examples.paper.training.checkpoint import BEST, load_trained, read_best, read_checkpoint
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer

STATE = {
    "settings": {"dataset": "cifar10", "lr": 0.1, "pretrained": None},
    "epoch": 3,
    "model": {"conv": torch.linspace(-1, 1, 300), "labels": torch.arange(20), "half": torch.ones(7).half()},
    "average": None,
    "rng": torch.arange(64, dtype=torch.uint8),
}


def saved(state, **options):
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


WHOLE = saved(STATE)
DIRECTORY = WHOLE.index(b"PK\x01\x02")  # of the zip: names, places, and what is a folder


@pytest.mark.parametrize("part", [(0, DIRECTORY), (DIRECTORY, len(WHOLE))])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, part):
    path, bits = tmp_path / "checkpoint.pt", random.Random(0).sample(range(8 * part[0], 8 * part[1]), 200)
    refused = 0
    for bit in bits:
        damaged = bytearray(WHOLE)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert equal(read_checkpoint(path), STATE), f"bit {bit}"
        except ValueError as error:
            refused += 1
            assert "damaged" in str(error) or "no checkpoint of a training" in str(error), error  # noqa: PT017
    assert refused > 50


@pytest.mark.parametrize("tensor", STATE["model"])
def test_each_bit_of_a_weight_counts(tmp_path, tensor):
    raw = STATE["model"][tensor].numpy().tobytes()
    start, path = WHOLE.index(raw), tmp_path / "checkpoint.pt"
    for bit in (0, 6, 8 * len(raw) - 1):
        damaged = bytearray(WHOLE)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="its bytes do not match its checksums; bring back a copy"):
            read_checkpoint(path)


def test_a_part_that_calls_itself_a_folder_is_refused(tmp_path):
    """torch skips it, and its numbers are whatever the memory held."""
    damaged, at = bytearray(WHOLE), DIRECTORY
    while at > 0 and b"data/0" not in WHOLE[at : at + 66]:
        at = WHOLE.find(b"PK\x01\x02", at + 1)
    damaged[at + 38] ^= 0x10  # external attributes
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_cut_file_is_refused(tmp_path, share):
    (tmp_path / "checkpoint.pt").write_bytes(WHOLE[: int(share * len(WHOLE))])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read .*damaged or another file; bring"):
        read_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        saved([1, 2]),
        saved({"model": {}}),
        saved(torch.ones(3)),
        saved(STATE, _use_new_zipfile_serialization=False),
        bytes(10_000),
    ],
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (cannot be read|is no checkpoint of a training)"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_what_is_no_file_is_refused_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "nothing", "."):
        with pytest.raises(ValueError, match="there is no file"):
            read_checkpoint(tmp_path / name)


SETTINGS = {"arch": "resnet18", "activation": "relu", "sites": "*act*", "width": 8, "dataset": "cifar10"}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": None},
        {"settings": SETTINGS | {"pretrained": None, "arch": "resnet50"}},
        {"settings": SETTINGS | {"pretrained": None, "width": 16}},
        {"settings": SETTINGS | {"pretrained": None}, "model": {"conv": torch.ones(2)}},
        {"settings": SETTINGS | {"pretrained": None}, "model": None},
    ],
)
def test_a_checkpoint_of_another_program_or_version_is_one_error(tmp_path, change):
    model = build("resnet18", "relu", "*act*", width=8).state_dict()
    (tmp_path / "checkpoint.pt").write_bytes(saved(STATE | {"model": model} | change))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another program or version: "):
        load_trained(tmp_path / "checkpoint.pt")


def test_a_damaged_best_epoch_is_refused(tmp_path):
    (tmp_path / BEST).parent.mkdir()
    damaged = bytearray(WHOLE)
    damaged[WHOLE.index(STATE["model"]["conv"].numpy().tobytes()) + 4] ^= 1
    (tmp_path / BEST).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"best.checkpoint\.pt is damaged"):
        read_best(tmp_path, STATE["settings"])


def tiny(digest):
    return Trainer(torch.nn.Linear(2, 2), replace(RECIPES["fast"], epochs=1), 4, digest=digest)


def test_a_training_goes_on_with_its_own_images_only(tmp_path):
    tiny("a").save(tmp_path / "checkpoint.pt", {})
    tiny("a").load(tmp_path / "checkpoint.pt", {})
    with pytest.raises(ValueError, match="on other images or labels than these, or in another order"):
        tiny("b").load(tmp_path / "checkpoint.pt", {})


@pytest.mark.parametrize("lost", ["rng", "scheduler", "order"])
def test_a_checkpoint_that_lacks_something_is_one_error(tmp_path, lost):
    tiny("a").save(tmp_path / "checkpoint.pt", {})
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state[lost]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"is of another program or version: KeyError: '{lost}'"):
        tiny("a").load(tmp_path / "checkpoint.pt", {})
