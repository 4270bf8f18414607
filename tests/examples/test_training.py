import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from sparta_act import Sparta, SpartaSet, replace_relus
from tests.examples.conftest import EXAMPLES
from tests.examples.test_files import ROOT, copied

RELU = EXAMPLES / "networks" / "cifar10-resnet18-w16-relu.safetensors"
SPARTA = EXAMPLES / "networks" / "cifar10-resnet18-w16.safetensors"


def start(folder, tiny_data, out, *options):
    """Begin a training as a user does."""
    program = [sys.executable, folder / "adversarial_training.py", "--data", tiny_data, "--out", out]
    small = ("--width", "4", "--epochs", "2", "--batch-size", "32", *options)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, program), *small],
        cwd=folder.parent,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def unbroken(tiny_data, tmp_path_factory):
    """The folder of the program, what a training printed, and what it left."""
    home = tmp_path_factory.mktemp("home")
    folder = copied(home / "copy", "adversarial_training.py", "pgd.py", "models.py", "data.py")
    training = start(folder, tiny_data, home / "unbroken")
    printed, _ = training.communicate()
    assert training.returncode == 0
    return folder, printed, home / "unbroken"


@pytest.mark.slow
def test_a_killed_training_resumes_bit_for_bit(unbroken, tiny_data, tmp_path):
    folder, printed, out = unbroken
    training = start(folder, tiny_data, tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists():
        assert training.poll() is None
        time.sleep(0.02)
    training.send_signal(signal.SIGKILL)
    before, _ = training.communicate()
    assert "test images" not in before
    resumed = start(folder, tiny_data, tmp_path / "killed", "--resume")
    after, _ = resumed.communicate()
    assert "epoch 1 of 2" not in after
    assert after.splitlines()[:-1] == printed.splitlines()[-len(after.splitlines()) : -1]
    expected, found = (torch.load(p, weights_only=True) for p in (out / "checkpoint.pt", checkpoint))
    assert expected["epoch"] == found["epoch"] == 2
    for key, tensor in expected["network"].items():
        assert torch.equal(found["network"][key], tensor), key


@pytest.mark.slow
def test_the_set_that_was_saved_loads_again(unbroken, example):
    _, printed, out = unbroken
    assert printed.splitlines()[-1] == f"saved: {out / 'set'}"
    activations = Sparta.from_pretrained(out / "set")
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["network"]
    assert [*activations] == ["G1.B2", "G2.B2", "G3.B2", "G4.B2"]
    for label, activation in activations.items():
        for name, tensor in activation.state_dict().items():
            assert torch.equal(tensor, trained[f"layer{label[1]}.1.act2.{name}"].half().float())
    replace_relus(example("models").ResNet18(4), "G*.B-1", activations)


def test_no_gain_decays(example):
    training = example("adversarial_training")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Sparta(8), Sparta(8).freeze())
    decays, gains = training.parameter_groups(model, 5e-4)
    assert (decays["weight_decay"], gains["weight_decay"]) == (5e-4, 0)
    assert gains["params"] == [model[1].gain]
    assert len(decays["params"]) == 2 + 5


def test_which_activation_is_put_where(example):
    training, models = example("adversarial_training"), example("models")
    put = training.put_activation
    plain, frozen, model = models.ResNet18(4), models.ResNet18(16), models.ResNet18(4)
    put(plain, "relu", "G*.B-1", identity=False)
    assert not [m for m in plain.modules() if isinstance(m, Sparta)]
    put(frozen, "cifar10-resnet18-w16", "G*.B-1", identity=False)
    assert frozen.layer1[1].act2.frozen
    put(model, "sparta", "G{1,4}.B1", identity=True)
    spartas = SpartaSet.of(model)
    assert dict(spartas) == {"G1.B1": model.layer1[0].act2, "G4.B1": model.layer4[0].act2}
    assert spartas["G1.B1"].identity


def test_nan_counts_as_wrong(example):
    """Also for class 0, the class of an argmax of NaN."""
    training, quickstart = example("adversarial_training"), example("quickstart")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model[1].weight.data.fill_(torch.nan)
    x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 0, 1, 2, 0])

    class Alone:
        gather_for_metrics = staticmethod(lambda rows: rows)

    found = training.evaluate(Alone, model, [(x, y)], lambda _, x, y: x)
    assert found == [5, 5, 5]
    assert quickstart.wrong(model, x, y) == "5 of 5 wrong (100.0%)"


def pictures(folder, *classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / name / "0.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data no/such/folder", "no/such/folder is neither a folder with train/ and test/ nor one with"),
        ("--data one", "train/ and test/ need the same classes, two or more, not ['cat'] and ['cat']"),
        ("--data other", "need the same classes, two or more, not ['cat', 'dog'] and ['cat', 'fox']"),
        ("--data untested", "untested has a train/, but neither test/ nor val/"),
        ("--network resnet19", "no network 'resnet19': known are resnet18, torchvision/NAME and timm/NAME"),
        ("--network torchvision/resnet19", "Unknown model resnet19"),
        ("--network timm/resnet19", "Unknown model (resnet19)"),
        ("--width 0", "width must be at least 1, not 0"),
        (f"--width 8 --init {RELU}", "'dataset': 'cifar10'}: 101 tensors do not fit, such as bn1.bias"),
        (f"--init {SPARTA}", "is of another network, {'arch': 'resnet18', 'activation': 'sparta', "),
        ("--init nothing.safetensors", "cannot read nothing.safetensors"),
        ("--eps wide", "Invalid literal for Fraction: 'wide'"),
        ("--eps 1/0", "Fraction(1, 0)"),
        ("--eps 8", "eps is a fraction of the pixel range"),
        ("--eps=-1/255", "eps is a fraction of the pixel range"),
        ("--eps nan", "Invalid literal for Fraction: 'nan'"),
        ("--step-size 0", "step_size must be above 0"),
        ("--step-size=-1/255", "step_size is a fraction"),
        ("--lr nan", "lr is at least 0"),
        ("--lr inf", "lr is at least 0"),
        ("--seed -1", "seed is at least 0 and below 2**31"),
        ("--seed 4294967295", "seed is at least 0 and below 2**31"),
        ("--data hidden", "a hidden folder would become a class; delete hidden/train/.trash"),
        ("--data empty", "Found no valid file for the classes cat"),
        ("--steps -1", "steps, epochs, sizes are at least 1"),
        ("--steps 0", "steps, epochs, sizes are at least 1"),
        ("--epochs 0", "steps, epochs, sizes are at least 1"),
        ("--batch-size 0", "steps, epochs, sizes are at least 1"),
        ("--size 0", "steps, epochs, sizes are at least 1"),
        ("--lr -1", "lr is at least 0"),
        ("--step-size 2", "step_size is a fraction of the pixel range"),
        ("--out one/test/cat/0.png", "0.png"),
        ("--sites G9.B1", "G9.B1"),
        ("--activation no/such/set", "there is no folder 'no/such/set'"),
    ],
)
def test_bad_input_ends_in_one_clear_error(options, message, example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, classes in (("one", ["cat"]), ("other", ["cat", "dog"]), ("untested", ["cat", "dog"])):
        pictures(tmp_path / folder / "train", *classes)
    pictures(tmp_path / "hidden" / "train", "cat", "dog", ".trash")
    pictures(tmp_path / "hidden" / "test", "cat", "dog")
    for split in ("train", "test"):
        (tmp_path / "empty" / split / "cat").mkdir(parents=True)
    (tmp_path / "empty/train/cat/._0.png").write_bytes(b"of a Mac")
    pictures(tmp_path / "one" / "test", "cat")
    pictures(tmp_path / "other" / "test", "cat", "fox")
    monkeypatch.setattr(sys, "argv", ["adversarial_training.py", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        example("adversarial_training").main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "my-run").exists()


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(
    example, tiny_data, tmp_path, monkeypatch, capsys
):
    training = example("adversarial_training")
    (tmp_path / "my-run").mkdir()
    options = vars(training.parser().parse_args(["--data", tiny_data]))
    same = {k: str(v) for k, v in options.items() if k not in ("out", "resume")}
    monkeypatch.chdir(tmp_path)
    for settings, more, message in (
        (same, [], "exists: continue that run with --resume, or give another --out"),
        (
            same | {"epochs": "4", "seed": "3"},
            ["--resume"],
            "is of another run (epochs was 4, is 5; seed was 3, is 0): give another --out",
        ),
        ({}, ["--resume"], "is not a checkpoint of this program"),
    ):
        training.save_checkpoint(tmp_path / "my-run" / "checkpoint.pt", {"settings": settings})
        monkeypatch.setattr(sys, "argv", ["adversarial_training.py", "--data", tiny_data, *more])
        with pytest.raises(SystemExit):
            training.main()
        assert message in capsys.readouterr().err
    (tmp_path / "my-run" / "checkpoint.pt").write_text("not a checkpoint")
    with pytest.raises(SystemExit):
        training.main()
    assert "my-run/checkpoint.pt is not a checkpoint of this program" in capsys.readouterr().err


def flips(content, count):
    """The content with one flipped bit, at random places."""
    for bit in random.Random(0).sample(range(8 * len(content)), count):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_a_damaged_checkpoint_is_refused_or_read_right(example, tmp_path):
    training, path = example("adversarial_training"), tmp_path / "checkpoint.pt"
    training.save_checkpoint(path, {"settings": {"lr": "1"}, "images": "a", "network": torch.arange(900)})
    content, refused = path.read_bytes(), 0
    cuts = (content[: int(share * len(content))] for share in (0, 0.3, 0.6, 0.99))
    for damaged in (*flips(content, 200), *cuts):
        path.write_bytes(damaged)
        try:
            state = training.load_checkpoint(path, True, {"lr": "1"})
            assert state["network"].equal(torch.arange(900))
        except ValueError:
            refused += 1
    assert refused > 150


def test_a_checkpoint_is_written_through_no_link_and_whole_or_not_at_all(example, tmp_path):
    training, path, victim = example("adversarial_training"), tmp_path / "checkpoint.pt", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "checkpoint.tmp").symlink_to(victim)
    training.save_checkpoint(path, {"settings": {}})
    assert (victim.read_text(), path.is_symlink()) == ("precious", False)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt .*; an old one is whole"):
            training.save_checkpoint(path, {"settings": {}, "network": torch.ones(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "victim"]


def test_a_second_training_in_one_folder_is_refused(example, tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "my-run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adversarial_training.py", "--width", "4", "--data", tiny_data])
    with FileLock("my-run/lock"), pytest.raises(SystemExit):
        example("adversarial_training").main()
    assert "another training writes into my-run: give another --out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "my-run").iterdir()] == ["lock"]
