"""All that takes a device, on another than the CPU: a GPU where there is one, else a stand-in for one.

`test_devices.py` runs this file in a process of its own.
"""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.paper.attacks import autoattack
from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import attacking, pgd
from examples.paper.attacks.robust_error import robust_errors
from examples.paper.audit import attacks, gate_statistics
from examples.paper.audit import command as audit_command
from examples.paper.audit.budget import Budget
from examples.paper.audit.noise import noise
from examples.paper.audit.run import audit
from examples.paper.common import data, models, records, tf32
from examples.paper.evaluation import measure
from examples.paper.evaluation.command import main as evaluate
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.maskers.small import Small
from examples.paper.pictures import figures
from examples.paper.results import command
from examples.paper.training.checkpoint import load_trained
from examples.paper.training.command import main as train
from examples.paper.training.loop import Settings, epochs, read_log
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta, replace_relus
from tests.helpers import stand_in
from tests.helpers.queues import QUICK, SMALL
from tests.paper.test_autoattack import TenLevels

FAST = RECIPES["fast"]
ATTACK = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 2}
SET = "cifar10-resnet18-w16"


@pytest.fixture(scope="module")
def device():
    if torch.cuda.is_available():
        return "cuda"
    return stand_in.install()


def assign(x, where, value):
    x[where] = value
    return x


MIXED = {  # the same tensor of shape (4, 3) on the device and on the CPU
    "a sum": lambda x, c: x + c,
    "a number of the device": lambda x, c: c * x.sum(),
    "in place": lambda x, c: c.add_(x),
    "a matrix product": lambda x, c: x @ c.T,
    "a layer that was not moved": lambda x, c: nn.Linear(3, 2)(x),
    "labels": lambda x, c: F.cross_entropy(x, torch.tensor([0, 1, 2, 0])),
    "a choice": lambda x, c: torch.where(c > 0.5, x, x),
    "joined": lambda x, c: torch.cat([x, c]),
    "numbers joined": lambda x, c: torch.stack([x.sum(), c.sum()]),
    "gathered": lambda x, c: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    "compared": lambda x, c: torch.equal(x, c),
    "read by a mask": lambda x, c: c[x > 0.5],
    "read by indices": lambda x, c: c[torch.tensor([0, 1], device=x.device)],
    "filled by a mask": lambda x, c: assign(c, x > 0.5, 0.0),
    "written from the CPU": lambda x, c: assign(x, c > 0.5, c[c > 0.5]),
    "written from the device": lambda x, c: assign(c, c > 0.5, x[x > 0.5]),
    "an order": lambda x, c: torch.randperm(3, device=x.device, generator=torch.Generator()),
    "random numbers": lambda x, c: x.uniform_(generator=torch.Generator()),
    "to numpy": lambda x, c: x.numpy(),
    "taken by numpy": lambda x, c: np.asarray(x),
}
ALLOWED = {
    "a number of the CPU": lambda x, c: x * torch.tensor(2.0),
    "read by a mask": lambda x, c: x[c > 0.5],
    "read by indices": lambda x, c: x[torch.tensor([2, 0])],
    "read at a number": lambda x, c: c[torch.tensor(1, device=x.device)],
    "filled by a mask": lambda x, c: assign(x, c > 0.5, torch.tensor(0.0)),
    "filled": lambda x, c: x.masked_fill(x > 0.5, torch.tensor(0.0)),
    "written from the CPU": lambda x, c: assign(x, slice(1, 3), 2 * c[:2]),
    "written from the device": lambda x, c: assign(c, slice(1, 3), 2 * x[:2]),
    "copied": lambda x, c: c.copy_(2 * x),
    "as text": lambda x, c: torch.tensor(float(f"{x.sum():.3f}")),
    "as a list": lambda x, c: torch.tensor(x.tolist()),
    "made there": lambda x, c: torch.arange(3, device=x.device) + torch.ones_like(x),
    "squeezed": lambda x, c: x[:1].squeeze_(0).unsqueeze_(1) + 1,
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_a_gpu_and_its_stand_in_refuse_tensors_of_the_cpu(mixed, device):
    x = torch.rand(4, 3)
    mixed(x.clone(), x.clone())  # nothing else is wrong with it
    with pytest.raises((RuntimeError, TypeError)):
        mixed(x.to(device), x.clone())


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_a_gpu_and_its_stand_in_take_what_may_be_mixed(allowed, device):
    x = torch.rand(4, 3)
    found, expected = allowed(x.to(device), x.clone()), allowed(x.clone(), x.clone())
    torch.testing.assert_close(found.cpu(), expected)


def test_the_stand_in_says_where_it_cannot_follow(device):
    if device == stand_in.NAME:
        with pytest.raises(NotImplementedError, match="resized"):
            torch.cat([torch.ones(2, device=device)] * 2, out=torch.empty(0, device=device))


class LeftBehind(nn.Module):
    """A network with a tensor that does not move with it."""

    def __init__(self):
        super().__init__()
        self.body, self.mean = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), torch.zeros(3, 1, 1)

    def forward(self, x):
        return self.body(x - self.mean)


USES = {
    "training": lambda model, x, y: Trainer(model, FAST, 4, device=x.device.type).step(x, y),
    "pgd": lambda model, x, y: pgd(model, x, y, **ATTACK),
    "pgd, targeted": lambda model, x, y: pgd(model, x, y, **ATTACK, targeted=True),
    "robust errors": lambda model, x, y: robust_errors(model, x, y, **ATTACK),
    "noise": lambda model, x, y: noise(model, x, y, eps=0.1, draws=2),
    "gate": lambda model, x, y: gate_statistics.statistics(model, x, y),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_mistake_in_a_network_is_not_passed_over(use, device):
    x, y = torch.rand(4, 3, 4, 4), torch.arange(4)
    use(LeftBehind(), x, y)
    with pytest.raises(RuntimeError, match="same device"):
        use(LeftBehind().to(device), x.to(device), y.to(device))


def learnt(make, device):
    """Result and gradients of a fresh module, on the CPU."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), make(16)).to(device)
    x = torch.randn(3, 3, 7, 7, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    y = module(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y.square().sum(), wanted))]


@pytest.mark.parametrize("name", [n for n, make in models.ACTIVATIONS.items() if make])
def test_every_activation_is_what_it_is_on_the_cpu(name, device):
    with tf32.exact_float32():
        found, expected = (learnt(models.ACTIVATIONS[name], d) for d in (device, "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_set_is_what_it_is_on_the_cpu(device):
    with tf32.exact_float32():
        found, expected = (learnt(lambda _: Sparta.from_pretrained(SET)["G1.B2"], d) for d in (device, "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_surgery_on_a_network_that_was_moved(device):
    model = replace_relus(models.ResNet("resnet18", width=8).to(device), "G*.B-1", Sparta)
    places = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert places == {device}
    assert model(torch.rand(2, 3, 32, 32, device=device)).isfinite().all()


def test_batch_norm_is_folded_there_too(device):
    model, x = models.build("resnet18", "sparta", "G*.B-1", width=8), torch.rand(2, 3, 32, 32, device=device)
    with attacking(model.to(device)):
        fast = folded(model, x)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
    assert fast is not model


def test_robust_errors_are_the_known_ones(device):
    offset = torch.tensor([0.0, 0.03, -0.03, 0.01, -0.01, 0.03, -0.03, 0.0, 0.02, 0.0])
    y = torch.arange(10)
    x = (y / 9 + offset).clamp(0, 1).view(-1, 1, 1, 1).expand(-1, 3, 6, 6).contiguous()
    attack = {**ATTACK, "steps": 5, "batch_size": 3}
    wrong = robust_errors(TenLevels().to(device), x.to(device), y.to(device), **attack)
    half_way = 1 / 18  # to the next level
    assert wrong.tolist() == (offset.abs() + attack["eps"] > half_way).tolist()


def arguments(text, *more):
    return [*text.split(), *map(str, more)]


def tiny_run(out, device, tiny_data, text):
    settings = "--limit 8 --width 8 --batch-size 4 " + text
    return arguments(settings, "--out", out, "--device", device, "--data", tiny_data)


@pytest.fixture(scope="module")
def run(device, tiny_data, tmp_path_factory):
    """Folder of a run on the device that was stopped after an epoch and gone on with."""
    out = tmp_path_factory.mktemp("run")
    settings = Settings(limit=8, width=8, recipe="modern")
    recipe = dataclasses.replace(RECIPES["modern"], batch_size=4, steps=2, epochs=2)
    first = epochs(settings, recipe, out=out, data_dir=tiny_data, device=device)
    next(first)
    first.close()
    train(tiny_run(out, device, tiny_data, "--recipe modern --steps 2 --epochs 2 --resume"))
    return out


@pytest.mark.slow
def test_a_run_goes_on_and_is_read_on_the_cpu(run):
    first, second = read_log(run / "log.csv")
    assert all(math.isfinite(float(row["loss"])) for row in (first, second))
    sites = [*(f"layer{i}.1.act2" for i in range(1, 5)), "all sites"]
    assert [k for k in second if k.endswith("> 0.99")] == [f"{site} > 0.99" for site in sites]
    model, _ = load_trained(run / "checkpoint.pt")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "--recipe paper --steps 2 --clean-start 0.2 --label-smoothing 0.1",
        "--recipe fast --attack-norm train --amp bf16 --nesterov",
        "--recipe standard --activation relu",
        "--recipe modern --steps 2 --validation 4",
        f"--recipe fast --width 16 --activation sparta --pretrained {SET}",
    ],
)
def test_every_recipe_trains(text, device, tiny_data, tmp_path):
    train(tiny_run(tmp_path, device, tiny_data, text + " --epochs 1"))
    (row,) = read_log(tmp_path / "log.csv")
    assert math.isfinite(float(row["loss"]))
    if "--pretrained" in text:
        model, _ = load_trained(tmp_path / "checkpoint.pt")
        expected = Sparta.from_pretrained(SET)["G1.B2"].conv3
        torch.testing.assert_close(model.layer1[1].act2.conv3, expected)  # it did not move


@pytest.mark.slow
def test_evaluation(run, device, tiny_data, tmp_path):
    shutil.copy(run / "checkpoint.pt", tmp_path)
    options = arguments("--limit 2 --protocol quick", "--device", device, "--data", tiny_data)
    evaluate([str(tmp_path / "checkpoint.pt"), *options])
    errors = json.loads((tmp_path / "evaluation.json").read_text())["errors"]
    assert len(errors) == 1 + 2 + 2 + 1  # clean, targeted, at 8/255, worst case
    records.check_errors(errors)


def test_autoattack_takes_what_evaluation_has(device):
    pytest.importorskip("pyautoattack")
    x, y = torch.zeros(3, 3, 6, 6, dtype=torch.uint8), torch.tensor([7, 8, 9])  # all are wrong: it is short
    attack = measure.Attack("AutoAttack", {"eps": 8 / 255}, 3)
    found = measure.carry_out([attack], TenLevels(), x, y, seed=0, device=device, title="black")
    assert found["AutoAttack"].wrong.tolist() == [True] * 3


def test_autoattack_by_a_copy(device):
    """On a network with a batch norm to fold away, and with a gate."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), Sparta(8), nn.AvgPool2d(7), nn.Flatten()]
    model, x = nn.Sequential(*body, nn.Linear(32, 4)).to(device).eval(), torch.rand(3, 3, 32, 32).to(device)
    with torch.no_grad():
        y = model(x).argmax(1)
    few = {"parts": ["apgd-t", "fab-t", "square"], "steps": 1, "queries": 2, "title": "few"}
    found = autoattack.autoattack_by_copy(model, x, y, eps=1e-4, seed=0, batch_size=2, **few)
    assert found.images.device.type == found.wrong.device.type == "cpu"
    assert (found.images - x.cpu()).abs().max() <= 2e-4
    assert found.standing["square"] == 3 - found.wrong.sum()


class AllWrong(nn.Module):
    """Takes every image for an eleventh class, so that no attack has anything to do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 11)
        nn.init.constant_(self.fc.bias[10:], 1000)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.slow
def test_an_audit_makes_all_attempts_and_goes_on(device, tmp_path):
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model, surrogate = (Small(adaptive).to(device).eval() for adaptive in (Sparta, None))
    x = data.to_float(data.load("test")[0][:3], device)
    with torch.no_grad():
        y = model(x).argmax(1)  # all right, and hard to move by so little
    few = Budget(steps=2, restarts=2, draws=2, queries=5, control=2, autoattack=1, curve=4)
    more = {"eps": 0.2 / 255, "budget": few, "surrogates": {"relu": surrogate}}
    record = audit(model, x, y, out=tmp_path, **more)
    numbers = record["numbers"]
    assert record["attacks"].keys() >= {*attacks.ADAPTIVE, *attacks.TARGETED, "PGD, float64", "Square"}
    assert "not possible" not in json.dumps(numbers)  # an error there is told, and does not end the audit
    assert record["evidence"]["changed"] == 0
    again = audit(model, x, y, out=tmp_path, **more)
    assert again["numbers"]["seconds"] == numbers["seconds"]  # nothing was done again


@pytest.mark.slow
def test_the_audits_command(device, tiny_data, tmp_path):
    pytest.importorskip("pyautoattack")
    options = arguments("--limit 4", "--device", device, "--data", tiny_data, "--out", tmp_path)
    record = audit_command.run(audit_command.parser().parse_args([f"{__file__}:AllWrong", *options]))
    assert record["worst case"]["error"] == 1.0
    assert record["device"] == device


@pytest.mark.slow
def test_the_figures(run, device, tiny_data, tmp_path):
    options = arguments("--limit 2 --steps 3 --images 2", "--device", device, "--data", tiny_data)
    figures.main([str(run / "checkpoint.pt"), *options, "--out", str(tmp_path)])
    curve = json.loads((tmp_path / "loss.json").read_text())["loss per step"][run.name]
    assert len(curve["mean"]) == 3
    assert (tmp_path / "feature-maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_of_the_queue(device, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(QUICK, limit=2))
    (tmp_path / "queue.toml").write_text(SMALL.replace("limit = 40", "limit = 4"))
    places = ["--queue", tmp_path / "queue.toml", "--runs", tmp_path, "--results", tmp_path / "results"]
    command.run([str(a) for a in ("short-sparta", *places, "--device", device, "--amp", "bf16")])
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["short-sparta.json"]
