import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm import tqdm

from examples.paper.common import data
from examples.paper.common.lock import lock
from examples.paper.common.models import ACTIVATIONS, build
from examples.paper.results.run import multiply_adds
from examples.paper.training import loop
from examples.paper.training.checkpoint import load_trained, read_checkpoint
from examples.paper.training.command import main as train
from examples.paper.training.gate_statistics import gate_statistics
from examples.paper.training.loop import Settings, epochs, read_log
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from examples.paper.training.validation import held_out, validation_error
from sparta_act import Sparta, SpartaSet
from tests.helpers.fixtures import write_parquet
from tests.paper.test_autoattack import TenLevels

ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "examples.paper", "train")
TINY = replace(RECIPES["fast"], epochs=2, batch_size=50)


# Width 8: the oneDNN of torch 2.13 corrupts memory in the backward of a 1 x 1, stride 2, channels_last
# convolution from 4 to 8 channels, with or without SPARTA


def tiny_trainer(model=None, recipe=TINY, images=200, **more):
    torch.manual_seed(0)
    model = model or build("resnet18", "sparta", "G*.B2", width=8)
    return Trainer(model, recipe, images, **more)


def command(out, tiny_data, *more):
    arguments = [sys.executable, *TRAIN, "--out", out, "--data", tiny_data, "--width", "8"]
    arguments += ["--recipe", "fast", "--epochs", "3", "--batch-size", "10", "--device", "cpu"]
    arguments += ["--limit", "100", *more]
    return [str(a) for a in arguments]


def tiny_run(out, tiny_data, *more):
    arguments = ["--out", out, "--data", tiny_data, "--limit", 40, "--width", 8, "--epochs", 1]
    train([str(a) for a in (*arguments, "--device", "cpu", *more)])


def begin(out, tiny_data, name, **changes):
    """The first epoch of a training that holds out images."""
    settings, recipe = Settings(width=8, recipe=name, limit=40, validation=8), RECIPES[name]
    rows = epochs(settings, replace(recipe, **changes), out=out, data_dir=tiny_data, device="cpu")
    next(rows)
    rows.close()


# every 0.2 seconds, so that it saves inside an epoch
SAVING = "from examples.paper.training import command, loop; loop.SAVE_EVERY = 0.2; command.main()"


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path, tiny_data):
    """Killed after a checkpoint inside its second epoch, and again after one inside its third."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    whole = command(tmp_path / "whole", tiny_data, "--recipe", "single")
    subprocess.run(whole, check=True, env=environment, capture_output=True)

    checkpoint, resume = tmp_path / "killed/checkpoint.pt", []
    arguments = command(tmp_path / "killed", tiny_data, "--recipe", "single")[4:]
    for epoch in (1, 2):
        python = [sys.executable, "-c", SAVING, *arguments, *resume]
        run = subprocess.Popen(python, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while reached(checkpoint) < (epoch, 30):
            assert run.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)  # let it go on a little: what it learns since is lost
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert (epoch, 30) <= reached(checkpoint) < (epoch, 100)
        assert len(read_log(tmp_path / "killed/log.csv")) == epoch
        resume = ["--resume"]

    python = [sys.executable, *TRAIN, *arguments, "--resume"]
    subprocess.run([str(p) for p in python], check=True, env=environment, capture_output=True)
    whole, resumed = (
        torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("whole", "killed")
    )
    assert whole["epoch"] == resumed["epoch"] == 3
    for part in ("model", "average", "optimizer", "scheduler", "rng"):
        assert_same(whole[part], resumed[part])
    whole, resumed = (read_log(tmp_path / f / "log.csv") for f in ("whole", "killed"))
    assert [float(row["lr"]) for row in whole] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert [r | {"seconds": 0} for r in whole] == [r | {"seconds": 0} for r in resumed]


def reached(checkpoint):
    """Whole epochs of a checkpoint, and images of the one under way."""
    if not checkpoint.exists():
        return 0, 0
    state = torch.load(checkpoint, weights_only=True)
    return state["epoch"], state["seen"]


def test_an_epoch_goes_on_where_its_checkpoint_was_written(tmp_path, tiny_data):
    x, y = (t[:60] for t in data.load("train", tiny_data))
    recipe, path = replace(TINY, batch_size=10, averaging=0.9), tmp_path / "checkpoint.pt"

    class KilledError(Exception):
        pass

    def trained(trainer, after_batch=lambda: None):
        with tqdm(disable=True) as bar:
            return trainer.run_epoch(x, y, bar, after_batch)

    whole, killed = tiny_trainer(recipe=recipe, images=60), tiny_trainer(recipe=recipe, images=60)
    torch.manual_seed(1)
    rows = [trained(whole), trained(whole)]
    torch.manual_seed(1)
    assert trained(killed) == rows[0]

    def after_batch():
        if killed.seen == 30:
            killed.save(path, {})
        if killed.seen == 50:
            raise KilledError

    with pytest.raises(KilledError):
        trained(killed, after_batch)
    resumed = tiny_trainer(recipe=recipe, images=60)
    torch.manual_seed(2)
    resumed.load(path, {})
    assert (resumed.epoch, resumed.seen) == (1, 30)
    saved = resumed.seconds
    assert saved > 0
    assert trained(resumed) == rows[1]
    assert (resumed.epoch, resumed.seen) == (2, 0)
    assert resumed.seconds > saved
    whole.save(path, {})
    resumed.save(tmp_path / "resumed.pt", {})
    states = [torch.load(p, weights_only=True) for p in (path, tmp_path / "resumed.pt")]
    assert_same(*(s | {"seconds": 0} for s in states))


def test_now_and_then_a_training_is_kept_and_its_progress_told(tmp_path, monkeypatch):
    trainer = tiny_trainer(recipe=replace(TINY, epochs=4), images=100)
    trainer.epoch, trainer.seen = 1, 10
    checkpoint, progress, clock = tmp_path / "checkpoint.pt", tmp_path / loop.PROGRESS, [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    keep = loop.saver(trainer, tmp_path, {"images": 100})
    keep()
    assert not list(tmp_path.iterdir())  # it is not time yet
    clock[0], trainer.seen = clock[0] + 25, 35
    keep()
    clock[0], trainer.seen = clock[0] + 25, 85  # twice as fast as before
    keep()
    assert not checkpoint.exists()
    told = json.loads(progress.read_text())
    assert told.pop("ends") == pytest.approx(time.time() + (15 + 2 * 100) / 2, abs=5)
    assert told == {"epoch": 2, "images": 85, "images per second": 2}
    clock[0], trainer.seen = clock[0] + loop.SAVE_EVERY, 95
    keep()
    state = read_checkpoint(checkpoint)
    assert (state["epoch"], state["seen"], state["settings"]["images"]) == (1, 95, 100)


def assert_same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny_data):
    trainer = tiny_trainer()
    trainer.save(tmp_path / "checkpoint.pt", {"seed": 0, "lr": 0.1})
    with pytest.raises(ValueError, match=r"of another run: lr was 0\.1, now 0\.2"):
        trainer.load(tmp_path / "checkpoint.pt", {"seed": 0, "lr": 0.2})
    with pytest.raises(ValueError, match="go on with --resume, or choose another --out"):
        train(["--out", str(tmp_path), "--data", tiny_data])


def test_a_training_does_not_go_on_with_other_images(tmp_path, tiny_data):
    arguments = ["--out", tmp_path, "--width", 8, "--epochs", 2, "--limit", 40, "--validation", 8]
    arguments = [str(a) for a in (*arguments, "--recipe", "standard", "--device", "cpu", "--resume")]
    begin(tmp_path, tiny_data, "standard", epochs=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    x, y = data.load("train", tiny_data)
    pixel, label = x.clone(), y.clone()
    pixel[39, 0, 31, 31] ^= 1
    label[0] = (y[0] + 1) % 10
    for name, (images, labels) in {
        "a pixel": (pixel, y),
        "a label": (x, label),
        "the order": (x.flip(0), y.flip(0)),
        "other images": (255 - x, y),
    }.items():
        write_parquet(
            tmp_path / name / "train-0.parquet", images.permute(0, 2, 3, 1).numpy(), labels.tolist()
        )
        with pytest.raises(
            ValueError, match="on other images or labels than these, or in another order; give"
        ):
            train([*arguments, "--data", str(tmp_path / name)])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_second_training_in_one_folder_is_refused_at_its_start(tmp_path, tiny_data):
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"), pytest.raises(ValueError, match=r"another process works in .*run"):
        tiny_run(tmp_path / "run", tiny_data, "--seed", 1)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--sites", "G9.B1"], "G9.B1"),
        (["--data", "nowhere"], "nowhere"),
        (["--device", "cuda:99"], "cannot use --device"),
        (["--validation", 40], "40"),
        (["--pretrained", "no/such:set"], "there is no folder"),
        (["--resume"], "start without --resume"),
    ],
)
def test_a_refused_training_leaves_nothing(tmp_path, tiny_data, option, message):
    with pytest.raises((ValueError, OSError), match=message):
        tiny_run(tmp_path / "new/run", tiny_data, *option)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_holds_the_settings_of_earlier_ones():
    named = {"dataset", "arch", "activation", "sites", "width", "pretrained", "seed", "amp", "validation"}
    assert Settings().recorded(TINY, 9).keys() == named | {
        "images",
        "recipe",
        *(f.name for f in fields(TINY)),
    }


def test_a_log_that_is_none_is_refused(tmp_path):
    assert read_log(tmp_path / "log.csv") == []
    for text in (
        b"a,b\n1,2\n",
        b"epoch,seconds\n1\n",
        b"epoch,seconds\n1,soon\n",
        b"epoch,seconds\n1,2,3\n",
        b"\xff\xfe",
        b"epoch,seconds\n\0,1\n\0",
    ):
        (tmp_path / "log.csv").write_bytes(text)
        with pytest.raises(ValueError, match=r"log\.csv is no log of a training"):
            read_log(tmp_path / "log.csv")


def test_frozen_sparta_stays_and_the_rest_learns(tmp_path, tiny_data):
    torch.manual_seed(1)
    activations = {f"G{i + 1}.B2": Sparta(8 * 2**i) for i in range(4)}
    SpartaSet(activations).save_pretrained(tmp_path / "set")
    model = build("resnet18", "sparta", "G*.B2", width=8, pretrained=str(tmp_path / "set"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = data.load("train", tiny_data)
    with tqdm(disable=True) as bar:
        tiny_trainer(model).run_epoch(x, y, bar)
    frozen = [k for k in before if ".act2.conv" in k]
    assert len(frozen) == 20
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in frozen)
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])
    assert not torch.equal(model.layer1[0].conv1.weight, before["layer1.0.conv1.weight"])  # through the gates


def test_the_update_is_on_adversarial_images_in_train_mode(monkeypatch):
    trainer = tiny_trainer()
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda m, inputs: seen.append((m.training, (inputs[0] - x[: len(inputs[0])]).abs().max().item()))
    )
    trainer.step(x, y)
    assert [training for training, _ in seen[:-1]] == [False] * (len(seen) - 1)
    training, distance = seen[-1]
    assert training
    assert 10 / 255 < distance <= 16 / 255 + 1e-6


def test_gate_statistics_are_those_of_a_gate_we_know():
    """One image, two channels, two rows: s is +1 on the first and -1 on the second, c is +5 and -5.

    So a gate is a = sigmoid(5) or b = 1 - a: channel 0 is a, b by rows, channel 1 is b, a.
    """
    model = nn.Sequential(Sparta(2, dynamic=False), nn.Flatten())
    sparta, kernel = model[0], torch.zeros(3, 3)
    kernel[1, 1] = 1  # looks at its own place alone
    with torch.no_grad():
        sparta.gain.fill_(5.0)
        for weight in (sparta.conv1, sparta.conv2, sparta.conv3, sparta.conv4):
            weight.zero_()
        sparta.conv5[:] = kernel
        sparta.conv3[0, 0], sparta.conv4[0, 0] = kernel, kernel  # s: channel 0
        sparta.conv1[0, :], sparta.conv2[0, 0] = kernel, kernel  # c: more for channel 0
    x = torch.tensor([[4.0, 4.0], [2.0, 2.0]]).expand(1, 2, 2, 2).clone()
    a, b = torch.sigmoid(torch.tensor([5.0, -5.0])).tolist()
    known = {"gain": 5, "mean": 0.5, "std": (a - b) / 2, "spatial": 1, "< 0.01": 0.5, "> 0.99": 0.5}
    assert gate_statistics(model, x)["0"] == pytest.approx(known, abs=1e-4)
    assert model.training
    assert not sparta._forward_pre_hooks
    x[0, 0, 1], x[0, 1, 0] = -1.0, -1.0  # left are the open ones of each channel: the same number everywhere
    found = gate_statistics(model, x)["0"]
    known = {"gain": 5, "mean": a, "std": 0, "spatial": 0, "< 0.01": 0, "> 0.99": 1}
    assert found == pytest.approx(known, abs=1e-4)


def test_saturation_of_all_sites_counts_elements():
    """A first site of 12 active elements, half of them below 0.01, and a second of 4, all above 0.99."""

    class Known(Sparta):
        def attention(self, x):
            return self.known.expand_as(x)

    first, second = Known(2), Known(2)
    first.known, second.known = torch.tensor([0.001, 0.5]).view(2, 1, 1), torch.tensor(0.999)
    model = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), second)
    found = gate_statistics(model, torch.rand(2, 2, 3, 1) + 0.1)
    assert list(found) == ["0", "2", "all sites"]
    assert found["all sites"] == pytest.approx({"< 0.01": 6 / 16, "> 0.99": 4 / 16})
    assert gate_statistics(nn.Sequential(nn.ReLU()), torch.rand(2, 2, 3, 1)) == {}


def test_a_gate_that_differs_by_channel_alone_is_not_spatial():
    class ByChannel(Sparta):
        def attention(self, x):
            return torch.tensor([0.2, 0.6]).view(2, 1, 1).expand_as(x)

    found = gate_statistics(nn.Sequential(ByChannel(2)), torch.rand(3, 2, 4, 4) + 0.1)["0"]
    known = {"gain": 1, "mean": 0.4, "std": 0.2, "spatial": 0, "< 0.01": 0, "> 0.99": 0}
    assert found == pytest.approx(known, abs=1e-6)


def test_the_gain_has_no_weight_decay_and_as_read_a_tenth_of_the_rate():
    for activation, rate in (("sparta", 1), ("sparta-as-read", 0.1), ("sparta-pooled-normed", 0.1)):
        model = build("resnet18", activation, "G*.B2", width=8)
        trainer = tiny_trainer(model, replace(TINY, weight_decay=5e-4))
        groups = {id(p): g for g in trainer.optimizer.param_groups for p in g["params"]}
        names = dict(model.named_parameters())
        assert len(groups) == len(names)
        assert sum(name.endswith(".gain") for name in names) == (4 if rate == 1 else 0)
        gates = [name for name in names if re.search(r"\.1\.act2\.", name)]
        assert len(gates) >= 20
        for name, p in names.items():
            assert groups[id(p)]["lr"] == pytest.approx(0.1 * (rate if name in gates else 1)), name
            assert groups[id(p)]["weight_decay"] == (0 if name.endswith(".gain") else 5e-4), name


def test_the_schedules():
    steps = tiny_trainer(recipe=replace(TINY, decay="steps", epochs=9), images=50)
    assert [round(steps._lr_factor(k), 6) for k in (0, 2, 3, 5, 6, 8)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    linear = tiny_trainer(recipe=replace(TINY, decay="linear", epochs=10), images=50)
    assert [linear._lr_factor(k) for k in (0, 5, 10, 11)] == [1, 0.5, 0, 0]


def test_a_recipe_with_averaging_is_evaluated_with_its_average(tmp_path, tiny_data):
    out = tmp_path / "run"
    tiny_run(out, tiny_data, "--activation", "relu", "--recipe", "modern", "--steps", 1, "--batch-size", 20)
    model, settings = load_trained(out / "checkpoint.pt")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert settings["eps"] == 8 / 255
    assert torch.equal(model.conv1.weight, state["average"]["module.conv1.weight"])
    assert not torch.equal(model.conv1.weight, state["model"]["conv1.weight"])


@pytest.mark.slow
def test_the_average_forgets_its_first_weights():
    trainer = tiny_trainer(TenLevels(), replace(RECIPES["standard"], averaging=0.6), images=4)
    x, expected = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), None
    for step in range(1, 21):
        trainer.step(x, torch.tensor([1, 3, 5, 7]))
        now, decay = trainer.model.levels.detach().clone(), min(0.6, (1 + step) / (10 + step))
        expected = now if expected is None else decay * expected + (1 - decay) * now
        torch.testing.assert_close(trainer.average.module.levels.detach(), expected)
    assert not torch.allclose(expected, now)
    assert (1 + 2) / (10 + 2) < 0.6 < (1 + step) / (10 + step)


def test_compiled_training_is_the_same_training():
    x, y = torch.rand(10, 3, 8, 8), torch.arange(10)
    losses, recipe = [], replace(TINY, batch_size=4, steps=2)
    frames = torch._dynamo.utils.counters["frames"]
    for compiler in (None, {"backend": "aot_eager"}):  # without C++: seconds
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Sparta(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        trainer = tiny_trainer(nn.Sequential(*layers, nn.Linear(8, 10)), recipe, compiler=compiler)
        torch.manual_seed(1)
        before = frames["ok"]
        losses.append([trainer.step(x[i], y[i])[0].item() for i in torch.arange(10).split(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert frames["ok"] - before == 2  # the attack's and the update's; none for the smaller last batch


def test_the_step_does_nothing_that_waits_for_a_device():
    """On the meta device, where no number exists, whatever asks for one raises."""
    model = build("resnet18", "sparta", "G*.B2", width=8).to("meta")
    recipe = replace(TINY, steps=2, clean_start=0.2, label_smoothing=0.1, batch_size=4)
    trainer = Trainer(model, recipe, 4, device="meta")
    x, y = torch.empty(4, 3, 32, 32, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    assert trainer.step(x, y).device.type == "meta"


def test_the_step_rule_reaches_across_the_ball():
    recipe = replace(TINY, eps=0.1, step_size=0.01, steps=5)
    assert recipe.attack_step == 0.01
    assert replace(recipe, step_rule="reach").attack_step == pytest.approx(0.02)
    assert replace(recipe, step_rule="reach", steps=20).attack_step == 0.01
    x, y, moved = torch.full((2, 3, 32, 32), 0.5), torch.arange(2), []
    for rule in ("constant", "reach"):  # two steps from the image itself
        one = replace(recipe, step_rule=rule, steps=2, eps=0.2, clean_start=1.0, batch_size=2)
        trainer, seen = tiny_trainer(recipe=one), []
        trainer.model.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.append(inputs[0]))
        trainer.step(x, y)
        moved.append((seen[1] - seen[0]).abs().max().item())
    assert moved == pytest.approx([0.01, 0.1])


def test_a_clean_start_leaves_the_image_as_it_is():
    x = torch.rand(400, 3, 2, 2)
    for share in (0.0, 0.25):
        start = tiny_trainer(recipe=replace(TINY, clean_start=share))._start(x)
        assert (start == x).flatten(1).all(1).float().mean().item() == pytest.approx(share, abs=0.05)
        assert (start - x).abs().max() <= TINY.eps + 1e-6


def test_label_smoothing_and_nesterov_reach_the_update():
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    losses = {}
    for name, change in {
        "plain": {},
        "smooth": {"label_smoothing": 0.2},
        "nesterov": {"nesterov": True},
    }.items():
        trainer = tiny_trainer(recipe=replace(TINY, batch_size=8, **change))
        torch.manual_seed(1)
        losses[name] = [trainer.step(x, y)[0].item() for _ in range(2)]
    assert losses["smooth"][0] != losses["plain"][0]
    assert losses["nesterov"][0] == losses["plain"][0]  # before the first update
    assert losses["nesterov"][1] != losses["plain"][1]


def test_standard_training_sees_the_images_themselves():
    trainer, seen = tiny_trainer(recipe=replace(RECIPES["standard"], batch_size=8)), []
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    trainer.model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    trainer.step(x, y)
    assert len(seen) == 1
    assert torch.equal(seen[0], x)


def test_the_wide_control_has_the_parameters_of_the_readings_and_no_less_work():
    costs = {}
    for arch, activation in (
        ("resnet18", "sparta-pooled"),
        ("resnet18", "sparta"),
        ("resnet18-wide", "relu"),
    ):
        model = build(arch, activation, "G*.B-1", width=64).eval()
        costs[activation] = sum(p.numel() for p in model.parameters()), multiply_adds(model)
    assert costs["relu"][0] == pytest.approx(costs["sparta-pooled"][0], rel=0.01)
    assert costs["relu"][0] / costs["sparta"][0] == pytest.approx(2, rel=0.01)  # as queue.toml says
    assert costs["relu"][1] / costs["sparta"][1] == pytest.approx(1.5, rel=0.01)
    assert costs["relu"][1] > costs["sparta-pooled"][1]


def test_attention_counts_among_multiply_adds():
    plain, denoising = (
        multiply_adds(build("resnet18", activation, "G4.B2", width=8).eval())
        for activation in ("relu", "feature-denoising")
    )
    channels, positions = 64, 4 * 4
    convolutions = (2 * channels * channels // 2 + channels * channels) * positions
    assert denoising - plain == convolutions + 2 * positions * positions * channels


def test_digits_are_not_mirrored_and_normalized_by_their_own_numbers(tmp_path, tiny_data, monkeypatch):
    mirrored, augment = [], data.augment

    def watched(x, *, flip):
        mirrored.append(flip)
        return augment(x, flip=flip)

    monkeypatch.setattr(data, "augment", watched)
    tiny_run(tmp_path / "objects", tiny_data, "--recipe", "fast")
    tiny_run(tmp_path, tiny_data, "--recipe", "fast", "--dataset", "mnist-m")
    assert mirrored == [True, False]
    model, settings = load_trained(tmp_path / "checkpoint.pt")
    assert settings["dataset"] == "mnist-m"
    assert model.normalize.mean.flatten().tolist() == pytest.approx([0.4580, 0.4629, 0.4093])


@pytest.mark.parametrize("held", ["sparta", "sparta-static", "sparta-n2", "sparta-identity"])
def test_a_set_of_another_variant_than_asked_for_is_refused(tmp_path, held):
    make, name = ACTIVATIONS[held], str(tmp_path)
    SpartaSet({f"G{i + 1}.B2": make(8 * 2**i) for i in range(4)}).save_pretrained(name)
    model = build("resnet18", held, "G*.B-1", width=8, pretrained=name)
    assert model.layer4[1].act2.extra_repr() == make(64).freeze().extra_repr()
    with pytest.raises(ValueError, match=f"{name} holds {held}, not sparta-n4"):
        build("resnet18", "sparta-n4", "G*.B-1", width=8, pretrained=name)


def test_silu_and_sparta_share_a_network_and_half_a_relu_is_half_a_relu():
    model = build("resnet18", "silu+sparta", "G*.B-1", width=8)
    kinds = {name: type(m) for name, m in model.named_modules() if name.split(".")[-1].startswith("act")}
    sites = {f"layer{group}.1.act2" for group in range(1, 5)}
    assert {name for name, kind in kinds.items() if kind is Sparta} == sites
    assert {kind for name, kind in kinds.items() if name not in sites} == {nn.SiLU}
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    half = build("resnet18", "relu-half", "G*.B-1", width=8).eval()
    plain = build("resnet18", "relu", "G*.B-1", width=8).eval()
    plain.load_state_dict(half.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(half.layer4[1].act2(x), 0.5 * x.clamp(min=0))
    images = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(half(images), plain(images))
    for group in range(1, 5):
        plain.get_submodule(f"layer{group}.1").act2 = nn.Sequential(nn.ReLU(), Times(0.5))
    assert torch.equal(half(images), plain(images))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_what_is_held_out_is_spread_evenly_and_leaves_something():
    assert torch.where(held_out(3, 9))[0].tolist() == [0, 3, 6]
    for count, images in ((1, 2), (7, 50), (49, 50), (1000, 50000)):
        held = held_out(count, images)
        assert held.sum() == count
        assert len(held) == images
        assert (~held).any()
    with pytest.raises(ValueError, match="--validation 50: there are 50 training images, and none"):
        held_out(50, 50)


@pytest.mark.parametrize(("steps", "known"), [(0, [0, 0, 0, 0]), (10, [0, 1, 1, 0]), (1, [0, 1, 1, 0])])
def test_the_validation_error_is_that_of_pgd_however_weak_the_attack_in_training(steps, known):
    """Four gray images, of brightness k / 9 and an offset: which can be moved to half the way to the next."""
    levels, offset = torch.tensor([1, 3, 5, 7]) / 9, torch.tensor([0.0, 13.0, 7.0, -5.0])  # of 255
    x = (255 * levels + offset).round().to(torch.uint8).view(4, 1, 1, 1).expand(4, 3, 6, 6)
    recipe = replace(RECIPES["modern"], steps=steps)  # within 8/255: half the way is 14.2/255
    trainer = tiny_trainer(TenLevels(), recipe)
    before = torch.get_rng_state()
    assert validation_error(trainer, x, torch.tensor([1, 3, 5, 7])) == sum(known) / 4
    assert torch.equal(torch.get_rng_state(), before)


def test_the_network_validated_is_the_one_evaluated():
    trainer = tiny_trainer(TenLevels(), RECIPES["modern"])
    x, y = torch.full((2, 3, 6, 6), 28, dtype=torch.uint8), torch.tensor([1, 1])
    assert validation_error(trainer, x, y) == 0
    with torch.no_grad():
        trainer.average.module.levels.add_(1)
    assert validation_error(trainer, x, y) == 1


def test_validation_changes_no_training_and_keeps_the_best_epoch(tmp_path, tiny_data, monkeypatch):
    x, y = data.load("train", tiny_data)
    errors, trained = iter([0.6, 0.4, 0.4, 0.5]), {}
    monkeypatch.setattr(
        loop, "validation_error", lambda t, *held: (trained.update({t.epoch: copied(t)}), next(errors))[1]
    )
    for out, held in ((tmp_path / "with", (x[60:], y[60:])), (tmp_path / "without", None)):
        trainer = tiny_trainer(recipe=replace(TINY, epochs=4, averaging=0.9), images=60)
        list(loop.fit(trainer, x[:60], y[:60], out, {}, held))
    best, last, other = (
        torch.load(tmp_path / f / "checkpoint.pt", weights_only=True)
        for f in ("with/best", "with", "without")
    )
    assert_same(last["model"], other["model"])
    assert (best["epoch"], best["validation error"]) == (2, 0.4)
    assert_same(best["model"], trained[2])
    rows = read_log(tmp_path / "with/log.csv")
    assert [float(r["validation error"]) for r in rows] == [0.6, 0.4, 0.4, 0.5]
    assert not (tmp_path / "without/best").exists()


def test_a_best_epoch_that_is_lost_or_of_another_run_is_told_before_training(tmp_path, tiny_data):
    arguments = ["--out", tmp_path, "--data", tiny_data, "--limit", 40, "--width", 8, "--epochs", 2]
    arguments = [str(a) for a in (*arguments, "--validation", 8, "--recipe", "standard", "--device", "cpu")]
    begin(tmp_path, tiny_data, "standard", epochs=2)
    best, before = tmp_path / "best/checkpoint.pt", (tmp_path / "log.csv").read_bytes()
    state = torch.load(best, weights_only=True)
    for change, told in (({"seed": 7}, "is of another run"), (None, "is not there")):
        torch.save(state | {"settings": state["settings"] | (change or {})}, best)
        if change is None:
            best.unlink()
        with pytest.raises(ValueError, match=rf"the best epoch of .*, {told}; bring it back, or begin"):
            train([*arguments, "--resume"])
    torch.save(state, best)
    assert (tmp_path / "log.csv").read_bytes() == before
    (tmp_path / "log.csv").write_text("epoch,seconds\n1,2.5\n")  # without what it validated
    train([*arguments, "--resume"])
    first, second = read_log(tmp_path / "log.csv")
    assert (first["seconds"], first["validation error"]) == ("2.5", "")
    assert second["validation error"]


def copied(trainer):
    return {k: v.clone() for k, v in trainer.average.module.state_dict().items()}


def test_a_resumed_run_remembers_the_best_epoch(tmp_path, tiny_data, monkeypatch):
    arguments = ["--out", tmp_path, "--data", tiny_data, "--limit", 40, "--width", 8, "--epochs", 3]
    arguments = [str(a) for a in (*arguments, "--validation", 8, "--recipe", "modern", "--device", "cpu")]
    errors = iter([0.4, 0.6, 0.5])
    monkeypatch.setattr(loop, "validation_error", lambda *_: next(errors))
    begin(tmp_path, tiny_data, "modern", epochs=3)
    train([*arguments, "--resume"])
    best = read_checkpoint(tmp_path / "best/checkpoint.pt")
    assert best["epoch"] == 1
    assert best["settings"]["images"] == 32
    assert read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 3
    with pytest.raises(ValueError, match="validation was 8, now 9"):
        train([*arguments, "--resume", "--validation", "9"])
    model, _ = load_trained(tmp_path / "best/checkpoint.pt")
    assert_same(dict(model.state_dict()), dict(best["model"]))
    begun = ["--out", str(tmp_path / "best"), *arguments[2:], "--resume"]
    with pytest.raises(
        ValueError, match="is the network of one epoch alone; go on with the run it came from"
    ):
        train(begun)
