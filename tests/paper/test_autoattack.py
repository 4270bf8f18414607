"""AutoAttack by pyautoattack, against exact results and against torchattacks."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from tqdm import tqdm

from examples.paper.attacks.autoattack import autoattack, autoattack_by_copy
from examples.paper.common import data
from examples.paper.common.tf32 import exact_float32
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from tests.paper.test_evaluate import Brightness


class TenLevels(nn.Module):
    """Class k for brightness nearest to k / 9: whether an image can be broken within eps is known."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.arange(10) / 9)

    def forward(self, x):
        return -20 * (x.mean((1, 2, 3))[:, None] - self.levels) ** 2


@pytest.mark.slow
def test_the_exact_result_is_found():
    eps, y = 8 / 255, torch.arange(10)
    offset = torch.tensor([0.0, 0.03, -0.03, 0.01, -0.01, 0.03, -0.03, 0.0, 0.02, 0.0])
    x = (y / 9 + offset).clamp(0, 1).view(-1, 1, 1, 1).expand(-1, 3, 6, 6).contiguous()
    model = TenLevels()
    found = autoattack(model, x, y, eps=eps, seed=0, batch_size=4, title="known", steps=20, queries=200)
    assert found.wrong.tolist() == (offset.abs() + eps > 1 / 18).tolist()  # half the way to the next level
    assert found.standing == {"apgd-ce": 6, "apgd-t": 6, "fab-t": 6, "square": 6}
    assert torch.equal(model(found.images).argmax(1) != y, found.wrong)
    assert (found.images - x).abs().max() <= eps + 1e-6
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert not any("randomized" in w or "logits" in w for w in found.warnings)


class Counting(TenLevels):
    """Counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def at_the_levels(offset):
    y = torch.arange(10)
    return (y / 9 + offset).clamp(0, 1).view(-1, 1, 1, 1).expand(-1, 3, 6, 6).contiguous(), y


def passes(**arguments):
    """Number of forward passes for ten images that nothing can break."""
    model, (x, y) = Counting(), at_the_levels(torch.zeros(10))
    found = autoattack(model, x, y, eps=0.01, seed=0, batch_size=10, title="passes", **arguments)
    assert found.wrong.tolist() == [False] * 10
    assert found.standing == dict.fromkeys(arguments["parts"], 10)
    assert torch.equal(found.images, x)
    return model.passes


def test_square_takes_the_given_number_of_queries():
    few, more = (passes(parts=["square"], queries=q) for q in (5, 22))
    assert more - few == 17


@pytest.mark.parametrize(("part", "targets"), [("apgd-ce", 1), ("apgd-t", 9), ("fab-t", 9)])
def test_the_white_box_parts_take_the_given_number_of_steps(part, targets):
    few, more, many = (passes(parts=[part], steps=s) for s in (2, 5, 8))
    assert more - few == many - more  # the same for each step
    assert (more - few) % (3 * targets) == 0
    assert more > few
    assert passes(parts=[part], steps=2, queries=77) == few


def test_targets_are_all_other_classes_where_there_are_fewer_than_ten():
    class FourLevels(Counting):
        def forward(self, x):
            return super().forward(x)[:, ::3]

    counts = []
    for steps in (2, 5):
        model, y = FourLevels(), torch.arange(4)
        x = (y / 3).view(-1, 1, 1, 1).expand(-1, 3, 6, 6).contiguous()
        attack = {"parts": ["apgd-t"], "steps": steps, "eps": 0.01, "seed": 0, "batch_size": 4, "title": "4"}
        assert autoattack(model, x, y, **attack).standing == {"apgd-t": 4}
        counts.append(model.passes)
    assert counts[1] - counts[0] == 3 * 3


def test_only_the_given_parts_are_run():
    """Each part alone, then two parts, of which the second attacks what the first did not break."""
    offset = torch.tensor([0.0, 0.03, -0.03, 0.01, -0.01, 0.03, -0.03, 0.0, 0.02, 0.0])
    (x, y), known = at_the_levels(offset), (offset.abs() + 8 / 255 > 1 / 18).tolist()
    attack = {"eps": 8 / 255, "seed": 0, "batch_size": 10, "title": "parts"}
    for parts in (["apgd-ce"], ("apgd-t",), ["fab-t"]):
        found = autoattack(TenLevels(), x, y, **attack, parts=parts, steps=20)
        assert found.wrong.tolist() == known
        assert found.standing == {parts[0]: 6}
    found = autoattack(TenLevels(), x, y, **attack, parts=["square", "apgd-ce"], steps=20, queries=10)
    assert found.wrong.tolist() == known
    assert list(found.standing.items()) == [("square", 10), ("apgd-ce", 6)]


def test_warnings_of_the_library_are_returned():
    model = nn.Sequential(Brightness(), nn.Softmax(1))  # two classes, and probabilities
    x, y = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1).expand(2, 3, 4, 4).contiguous(), torch.tensor([1, 1])
    parts = ["apgd-ce", "fab-t", "square"]
    found = autoattack(model, x, y, eps=8 / 255, seed=0, batch_size=2, title="few", parts=parts)
    assert found.wrong.tolist() == [True, True]
    assert found.standing == {"apgd-ce": 0, "fab-t": 0, "square": 0}
    assert any("probability distribution" in w for w in found.warnings)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_where_gradients_vanish_it_warns_once_of_the_kind():
    class Saturated(TenLevels):
        def forward(self, x):
            return (1e4 * super().forward(x)).clamp(-1, 0)  # flat but for the very middle of a level

    x, y = torch.full((2, 3, 6, 6), 4.3 / 9), torch.tensor([0, 0])  # all logits are -1, the first class wins
    found = autoattack(Saturated(), x, y, eps=1e-3, seed=0, batch_size=1, title="flat", steps=10, queries=10)
    assert found.wrong.tolist() == [False, False]
    (zero,) = [w for w in found.warnings if "zero gradient" in w]
    assert zero.startswith("there are 1 points with zero gradient!")
    assert zero.endswith("more of this kind)")


class Mistaken(nn.Module):
    """A bad copy of `TenLevels`: off by one class."""

    def __init__(self):
        super().__init__()
        self.of = TenLevels()

    def forward(self, x):
        return self.of(x).roll(1, 1)


OFFSET = torch.tensor([0.0, 0.03, -0.03, 0.01, -0.01, 0.03, -0.03, 0.0, 0.02, 0.0])
BY_COPY = {
    "eps": 8 / 255,
    "seed": 0,
    "batch_size": 4,
    "title": "copy",
    "parts": ["apgd-ce", "fab-t"],
    "steps": 10,
}


@pytest.mark.parametrize("copy", [None, Mistaken()])
def test_errors_of_the_copy_alone_do_not_count(copy, monkeypatch):
    if copy is not None:
        monkeypatch.setattr("examples.paper.attacks.autoattack.folded", lambda *_: copy)
    (x, y), known = at_the_levels(OFFSET), (OFFSET.abs() + 8 / 255 > 1 / 18).tolist()
    model = TenLevels().train()
    y[0] = 9  # wrong as it is
    known[0] = True
    found = autoattack_by_copy(model, x, y, **BY_COPY)
    assert found.wrong.tolist() == known
    assert torch.equal(model(found.images).argmax(1) != y, found.wrong)
    assert torch.equal(found.images[~found.wrong], x[~found.wrong])
    assert found.standing == {"apgd-ce": 5, "fab-t": 5}
    assert (found.images - x).abs().max() <= 8 / 255 + 1e-6
    assert model.training
    assert model.levels.requires_grad


def test_the_copy_runs_in_tf32_and_the_network_does_not(monkeypatch):
    tf32 = {TenLevels: set(), Mistaken: set()}

    def look(module, inputs):
        (x,) = inputs
        tf32[type(module)].add(torch.backends.cudnn.allow_tf32)
        assert x.is_contiguous(memory_format=torch.channels_last)

    model, copy = TenLevels(), Mistaken()
    monkeypatch.setattr("examples.paper.attacks.autoattack.folded", lambda *_: copy)
    model.register_forward_pre_hook(lambda m, i: tf32[TenLevels].add(torch.backends.cudnn.allow_tf32))
    copy.register_forward_pre_hook(look)
    x, y = at_the_levels(OFFSET)
    with exact_float32():
        autoattack_by_copy(model, x, y, **BY_COPY)
    assert tf32 == {TenLevels: {False}, Mistaken: {True}}


def test_errors_that_depend_on_the_batch_count(monkeypatch):
    class Company(TenLevels):
        """Errs on every image of a batch of more than one."""

        def forward(self, x):
            return super().forward(x).roll(int(len(x) > 1), 1)

    model, (x, y) = Company(), at_the_levels(torch.zeros(10))
    monkeypatch.setattr("examples.paper.attacks.autoattack.folded", lambda *_: Mistaken())
    monkeypatch.setattr(
        "examples.paper.attacks.autoattack.clean_errors",
        lambda m, x, y, size: torch.zeros(len(y), dtype=torch.bool),
    )
    assert autoattack_by_copy(model, x, y, **BY_COPY | {"batch_size": 10}).wrong.all()


@pytest.mark.slow
def test_two_libraries_agree_on_32_images():
    """pyautoattack and torchattacks, on a small, slightly robust network."""
    import torchattacks

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(784, 10))
    x, y = data.load("train")
    recipe = replace(RECIPES["fast"], lr=0.02, batch_size=100, epochs=8, eps=8 / 255, step_size=5 / 255)
    trainer = Trainer(model, replace(recipe, targeted=False), len(x))
    with tqdm(disable=True) as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    model.eval()
    with torch.no_grad():
        right = torch.where(model(data.to_float(x)).argmax(1) == y)[0][:32]
    x, y = data.to_float(x[right]), y[right]
    length = {"steps": 20, "queries": 500}  # a fifth and a tenth of the standard's
    found = autoattack(model, x, y, eps=4 / 255, seed=0, batch_size=32, title="", **length)
    ours, left = found.wrong, found.standing
    assert 32 > left["apgd-ce"] > left["apgd-t"] >= left["fab-t"] >= left["square"] == 32 - ours.sum()
    attack = torchattacks.AutoAttack(
        model, norm="Linf", eps=4 / 255, version="standard", n_classes=10, seed=0
    )
    *gradients, square = attack._autoattack.attacks
    for part in gradients:
        part.steps = length["steps"]
    square.n_queries, square.rescale_schedule = length["queries"], False  # as the authors' schedule
    x_adv = attack(x, y)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv - x).abs().max() <= 4 / 255 + 1e-6
    with torch.no_grad():
        theirs = model(x_adv).argmax(1) != y
    print(
        f"wrong: pyautoattack {ours.sum()}, torchattacks {theirs.sum()}, differing {(ours != theirs).sum()}"
    )
    assert 5 < ours.sum() < 30
    assert (ours != theirs).sum() <= 1
