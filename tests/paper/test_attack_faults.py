"""Every attack, of the laboratory and of the example, against what it would attack in vain."""

import copy
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn
from tqdm import tqdm

from examples import pgd as example
from examples.paper.attacks import losses
from examples.paper.attacks.autoattack import autoattack, autoattack_by_copy
from examples.paper.attacks.pgd import attacking, pgd, pgd_at, pgd_steps, random_targets
from examples.paper.attacks.robust_error import dlr_errors, likeliest_wrong, robust_errors
from examples.paper.audit.budget import Budget
from examples.paper.audit.noise import noise
from examples.paper.audit.run import audit
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
EPS = 0.05
PGD = {"eps": EPS, "step_size": 0.02, "steps": 3}
AUTO = {"eps": EPS, "seed": 0, "batch_size": 8, "title": "", "steps": 3, "queries": 2}
FEW = {"parts": ["apgd-ce", "square"]}
IMAGES = {  # attacks that return images
    "example": lambda m, x, y, **k: example.pgd(m, x, y, **PGD | k),
    "pgd": lambda m, x, y, **k: pgd(m, x, y, **PGD | k),
    "pgd_at": lambda m, x, y, **k: pgd_at(m, x, y, **PGD | k | {"steps": [(PGD | k)["steps"]]}).popitem()[1],
}
ERRORS = {  # attacks that return what is wrong
    "robust_errors": lambda m, x, y, **k: robust_errors(m, x, y, **PGD | k),
    "dlr_errors": lambda m, x, y, **k: dlr_errors(m, x, y, **PGD | k),
}
LIBRARY = {
    "autoattack": lambda m, x, y, **k: autoattack(m, x, y, **AUTO | FEW | k).wrong,
    "autoattack_by_copy": lambda m, x, y, **k: autoattack_by_copy(m, x, y, **AUTO | FEW | k).wrong,
}
BLIND = {
    "noise": lambda m, x, y, **k: noise(m, x, y, **{"eps": EPS, "draws": 4} | k)[0],
    "square": lambda m, x, y, **k: autoattack(m, x, y, **AUTO | {"parts": ["square"]} | k).wrong,
}
WHITE_BOX = IMAGES | ERRORS | LIBRARY
ATTACKS = WHITE_BOX | BLIND


class Levels(nn.Module):
    """Class k for brightness nearest to 0.2 (k + 1); linear, so what can be broken within eps is known."""

    def __init__(self, classes=4):
        super().__init__()
        self.levels = nn.Parameter(0.2 * torch.arange(1, classes + 1))

    def forward(self, x):
        return 20 * (2 * x.mean((1, 2, 3))[:, None] * self.levels - self.levels**2)


OFFSET = torch.tensor([0.07, 0.03, -0.07, -0.03, 0.06, 0.02])
KNOWN = OFFSET.abs() + EPS > 0.1  # half the way to the next level


def known():
    y = torch.tensor([0, 1, 2, 3, 1, 2])
    x = (0.2 * (y + 1) + OFFSET).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Levels(), x, y


def wrong_after(attack, model, x, y):
    torch.manual_seed(1)
    found = ATTACKS[attack](model, x, y)
    if attack not in IMAGES:
        return found
    assert not found.requires_grad
    assert found.dtype == x.dtype
    assert (found - x).abs().max() <= EPS + 1e-6
    return example.is_wrong(model(found), y)


# ---- what is refused

LABELS = {
    "float": lambda y: y.double(),
    "bool": lambda y: y > 1,
    "byte": lambda y: y.byte(),
    "int32": lambda y: y.int(),
    "one-hot": lambda y: nn.functional.one_hot(y, 4),
    "one-hot floats": lambda y: nn.functional.one_hot(y, 4).float(),
    "a column": lambda y: y[:, None],
    "too few": lambda y: y[:-1],
    "one": lambda y: y[0],
    "a list": lambda y: y.tolist(),
    "elsewhere": lambda y: y.to("meta"),
    "ignored": lambda y: y.masked_fill(y == 2, -100),
    "below 0": lambda y: y - 1,
    "too high": lambda y: y + 1,
}
PICTURES = {
    "bytes": lambda x: (255 * x).byte(),
    "up to 255": lambda x: 255 * x,
    "normalized": lambda x: (x - 0.5) / 0.25,
    "a NaN": lambda x: x.index_fill(3, torch.tensor([1]), torch.nan),
    "infinite": lambda x: x.index_fill(3, torch.tensor([1]), -torch.inf),
    "flat": lambda x: x.flatten(1),
    "a single one": lambda x: x[0],
    "numpy": lambda x: x.numpy(),
    "without a pixel": lambda x: x[..., :0],
}
ANSWERS = {
    "a dict": lambda z: {"logits": z},
    "a tuple": lambda z: (z, z),
    "nothing": lambda z: None,
    "a map": lambda z: z[:, :, None, None],
    "classes": lambda z: z.argmax(1),
    "rounded to int": lambda z: z.long(),
    "one logit": lambda z: z[:, :1],
    "a vector": lambda z: z[:, 0],
    "fewer classes than labels": lambda z: z[:, :3],
    "twice the images": lambda z: z.repeat(2, 1),
}
NO_GRADIENT = {"detached": lambda z: z.detach(), "of numpy": lambda z: torch.from_numpy(z.detach().numpy())}


class Answering(nn.Module):
    def __init__(self, model, answer):
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, x):
        return self.answer(self.model(x))


def each(faults, some, attacks=ATTACKS, first="example"):
    """Every fault for one attack, since all share one check; and for each attack that it asks it."""
    return [(first, fault) for fault in faults] + [(a, f) for a in attacks if a != first for f in some]


@pytest.mark.parametrize(("attack", "fault"), each(LABELS, ["ignored", "too high"]))
def test_labels_that_are_no_class_numbers(attack, fault):
    model, x, y = known()
    with pytest.raises(ValueError, match=r"class numbers|a label or target is 4; the network has 4"):
        ATTACKS[attack](model, x, LABELS[fault](y))


@pytest.mark.parametrize(("attack", "fault"), each(PICTURES, ["a NaN"]))
def test_images_that_are_none(attack, fault):
    model, x, y = known()
    with pytest.raises(ValueError, match=r"images (are \(N, C, H, W\)|must lie in \[0, 1\])"):
        ATTACKS[attack](model, PICTURES[fault](x), y)


@pytest.mark.parametrize(("attack", "fault"), each(ANSWERS, ["a dict", "one logit"]))
def test_answers_that_are_no_logits(attack, fault):
    model, x, y = known()
    model = Answering(model, ANSWERS[fault]).train()
    with pytest.raises(ValueError, match=r"the network (must return logits|has one logit|has 3 classes)|DLR"):
        ATTACKS[attack](model, x, y)
    assert model.training
    assert model.model.levels.requires_grad


@pytest.mark.parametrize(("attack", "fault"), each(NO_GRADIENT, ["detached"], WHITE_BOX))
def test_logits_without_a_gradient(attack, fault):
    model, x, y = known()
    with pytest.raises(ValueError, match="do not depend on the images by autograd"):
        ATTACKS[attack](Answering(model, NO_GRADIENT[fault]), x, y)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_network_that_cannot_have_gradients(attack):
    model, x, y = known()
    with torch.inference_mode():
        frozen = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"made under torch.inference_mode.*copy.deepcopy\(net\)"):
        ATTACKS[attack](frozen, x, y)
    assert wrong_after(attack, copy.deepcopy(frozen), x, y).shape == (6,)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a != "example"])  # which takes functions, too
def test_what_is_no_network(attack):
    model, x, y = known()
    with pytest.raises(ValueError, match=r"a network is an nn.Module .* not a function"):
        ATTACKS[attack](lambda x: model(x), x, y)


BOUNDS = [8, -0.1, 1.01, float("nan"), float("inf"), "8/255", None, True, Fraction(8, 255), torch.tensor(0.1)]


@pytest.mark.parametrize(("attack", "eps"), each(BOUNDS, [8]))
def test_a_bound_that_is_no_fraction_of_1(attack, eps):
    with pytest.raises(ValueError, match="eps is a fraction of the pixel range"):
        ATTACKS[attack](*known(), eps=eps)


@pytest.mark.parametrize(
    ("attack", "step_size"), each([0, -0.1, 2, float("nan"), float("inf"), None], [0], IMAGES | ERRORS)
)
def test_a_step_that_goes_nowhere_or_too_far(attack, step_size):
    with pytest.raises(ValueError, match=r"step_size (is a fraction|must be above 0)"):
        ATTACKS[attack](*known(), step_size=step_size)


@pytest.mark.parametrize(("attack", "count"), each([0, -1, 2.5, 2.0, "2", True], [0], [*WHITE_BOX, "square"]))
def test_a_count_that_is_none(attack, count):
    name = "queries" if attack == "square" else "steps"
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not"):
        ATTACKS[attack](*known(), **{name: count})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda y: y, "a target is the label of its image"),
        (lambda y: (y + 1) % 4 + 4, "a label or target is 7; the network has 4 classes"),
        (lambda y: y - 1, "class numbers from 0 on, not -1"),
        (lambda y: nn.functional.one_hot((y + 1) % 4), "class numbers"),
        (lambda y: y[:3], "class numbers"),
    ],
)
def test_targets_that_are_none(target, message):
    model, x, y = known()
    with pytest.raises(ValueError, match=message):
        example.pgd(model, x, y, target=target(y), **PGD)


@pytest.mark.parametrize("draw", [random_targets, example.random_targets])
def test_one_class_has_no_targets(draw):
    with pytest.raises(ValueError, match="targets need"):
        draw(torch.zeros(3, dtype=torch.long), 1)


def test_targets_among_the_first_classes_alone():
    with pytest.raises(ValueError, match="one for each label: 10 are too few"):
        example.random_targets(torch.arange(100), 10)


def test_too_few_classes_for_a_loss():
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert losses.dlr(logits, y).shape == (5,)
    for loss, goals, classes in ((losses.dlr, (y % 2,), 2), (losses.dlr_to, (y, (y + 1) % 3), 3)):
        with pytest.raises(ValueError, match=f"needs at least {classes + 1} classes.* has {classes}"):
            loss(logits[:, :classes], *goals)
    x = torch.rand(5, 3, 4, 4)
    assert likeliest_wrong(lambda _: logits, x, y, 2).shape == (5, 2)
    with pytest.raises(ValueError, match="3 wrong classes are too many: the network has 3 classes"):
        likeliest_wrong(lambda _: logits, x, y, 3)


@pytest.mark.parametrize("attack", [autoattack, autoattack_by_copy])
@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_of_few_classes_leaves_its_targeted_loss_out(attack, classes):
    _, x, _ = known()
    model = Levels(classes)
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match=f"needs at least 4 classes, and the network has {classes}"):
        attack(model, x, y, **AUTO)
    found = attack(model, x, y, **AUTO | {"steps": 10, "parts": ["apgd-ce", "fab-t", "square"]})
    m = x.mean((1, 2, 3))  # of neighbors, the boundary is half way
    boundaries = 0.1 + 0.2 * torch.arange(1, classes)
    assert torch.equal(found.wrong, ((m[:, None] - boundaries).abs() < EPS).any(1))


def test_an_audit_of_labels_that_are_ignored(tmp_path):
    model, x, y = known()
    with pytest.raises(ValueError, match="class numbers from 0 on"):
        audit(model, x, y.masked_fill(y == 2, -100), out=tmp_path, budget=Budget(1, 1, 1, 1, 1, 1, 1))


# ---- what is accepted, with right results


def frozen_eval(model):
    """A network that always evaluates and whose train() returns nothing."""

    class Evaluating(Answering):
        def train(self, mode=True):
            super().train(False)

    return Evaluating(model, lambda z: z)


class InPlace(Levels):
    """Normalizes the images that it is given where they lie."""

    def forward(self, x):
        return super().forward(0.25 + 0.5 * x.sub_(0.25).div_(0.5))


GIVEN = {  # two or three that have nothing to do with each other in one
    "in float64, with gradients, in place": lambda m, x, y: (
        InPlace().double(),
        x.double().requires_grad_(),
        y,
    ),
    "frozen, channels last": lambda m, x, y: (
        m.requires_grad_(False),
        x.to(memory_format=torch.channels_last),
        y,
    ),
    "evaluating, in parallel, transposed": lambda m, x, y: (
        nn.DataParallel(frozen_eval(m)),
        x.transpose(2, 3),
        y,
    ),
    "scripted, every other pixel": lambda m, x, y: (
        torch.jit.script(m),
        x.repeat_interleave(2, 3)[..., ::2],
        y,
    ),
}
CONTEXTS = {  # the first makes the images inside, too
    "inference_mode, its own images": torch.inference_mode,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


def check_known(attack, model, x, y):
    found = wrong_after(attack, model, x, y)
    if attack in BLIND:
        assert not found[~KNOWN].any()
    else:
        assert torch.equal(found, KNOWN)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("given", GIVEN)
def test_what_can_be_broken_is_broken_however_it_is_given(attack, given):
    model, x, y = GIVEN[given](*known())
    before = x.detach().clone()
    check_known(attack, model, x, y)
    assert torch.equal(x, before)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_and_wherever_it_is_called(attack, context):
    model, x, y = known()
    with CONTEXTS[context]():
        if "its own" in context:
            x, y = x.clone(), y.clone()
        check_known(attack, model, x, y)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_images(attack):
    model, x, y = known()
    assert len(ATTACKS[attack](model, x[:0], y[:0])) == 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_within_a_bound_of_0_only_the_errors_are_wrong(attack):
    model, x, y = known()
    y[3] = 0
    steps = {"step_size": 0.0} if attack in IMAGES | ERRORS else {}
    found = ATTACKS[attack](model, x, y, eps=0, **steps)
    if attack in IMAGES:
        assert torch.equal(found, x)
    else:
        assert torch.where(found)[0].tolist() == [3]


# ---- NaN


class NoAnswer(nn.Module):
    """Answers class 2 by far; no number, in one logit or in all, for images brighter than 0.5 anywhere."""

    def __init__(self, where, answer):
        super().__init__()
        self.linear, self.where, self.answer = nn.Linear(48, 4), torch.tensor(where), answer

    def forward(self, x):
        x = x.flatten(1)
        z = 0.1 * self.linear(x) + torch.tensor([0.0, 0.0, 10.0, 0.0])
        return torch.where((x.amax(1, keepdim=True) > 0.5) & self.where, self.answer, z)


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ([True] * 4, torch.nan),
        ([False, False, True, False], torch.nan),
        ([False, False, True, False], torch.inf),
    ],
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_number_is_no_right_answer(attack, where, answer):
    """Also where it is the logit of the true class, whose index argmax returns."""
    model, x, y = NoAnswer(where, answer), torch.full((8, 3, 4, 4), 0.49), torch.full((8,), 2)
    assert wrong_after(attack, model, x, y).all()


@pytest.mark.parametrize("attack", IMAGES)
def test_a_gradient_that_is_nan_is_no_step(attack):
    """0 / 0 in the backward of one pixel: it stays, and the others still find the optimum."""

    class Root(Levels):
        def forward(self, x):
            z = super().forward(x)
            return z + 0 * (x[:, 0, 0, 0] - x[:, 0, 0, 0]).sqrt()[:, None]

    _, x, y = known()
    found = ATTACKS[attack](Root(), x, y)
    assert not found.isnan().any()
    assert torch.equal(example.is_wrong(Levels()(found), y), KNOWN)


def test_right_is_what_has_the_largest_logit_and_a_loss():
    n, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [
            [1.0, 2, 0],
            [1, 2, 0],
            [n, 2, 0],
            [1, n, 0],
            [n, n, n],
            [inf, 2, 0],
            [1, 2, -inf],
            [-inf, -inf, -inf],
        ]
    )
    y = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wrong = example.is_wrong(logits.to(dtype), y)
        assert wrong.tolist() == [False, True, True, True, True, True, False, True]
    largest = torch.tensor([[torch.finfo(torch.float32).max, 0.0]])
    assert not example.is_wrong(largest, torch.tensor([0])).any()


# ---- the network meanwhile


def test_a_norm_without_running_statistics_has_nothing_to_keep():
    norms = [nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, momentum=None)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms).train()
    x = torch.rand(6, 3, 5, 5)
    expected = model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with attacking(model, batch_statistics=True):
        torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [n.momentum for n in norms] == [0.1, None]


def test_what_eval_did_train_undoes():
    """As LoRA merges its weights in eval(), and takes them out again in train()."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += 1.0 if not mode else -1.0
            return super().train(mode)

    model = nn.Sequential(nn.Flatten(), Merging(4, 4), nn.Dropout()).train()
    model[2].eval()
    before = model[1].weight.clone()
    with attacking(model):
        torch.testing.assert_close(model[1].weight, before + 1)
    torch.testing.assert_close(model[1].weight, before)
    assert [m.training for m in model.modules()] == [True, True, True, False]


# ---- training


def trainer(classes, recipe="fast", num_classes=10, **changed):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    recipe = replace(RECIPES[recipe], batch_size=300, **changed)
    return Trainer(model, recipe, 300, num_classes=num_classes)


def test_targets_of_a_training_are_all_classes_of_the_network(monkeypatch):
    seen = []

    def watched(model, x, goal, **more):
        seen.append(goal)
        return pgd_steps(model, x, goal, **more)

    monkeypatch.setattr("examples.paper.training.trainer.pgd_steps", watched)
    x, y = torch.rand(300, 3, 6, 6), torch.randint(0, 60, (300,))
    trainer(60, num_classes=60).step(x, y)
    assert len(seen[0].unique()) > 55
    assert (seen[0] != y).all()
    wrong = trainer(60)
    before = wrong.model[0].weight.clone()
    with pytest.raises(ValueError, match=r"among 10 classes, .* has 60: give Trainer num_classes=60"):
        wrong.step(x, y)
    assert torch.equal(wrong.model[0].weight, before)
    trainer(60, targeted=False).step(x, y)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("label", "message"), [(-100, "from 0 on, not -100"), (7, "is 7; the network has 7")]
)
def test_a_training_refuses_labels_that_are_no_classes(steps, label, message):
    x, y = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8), torch.arange(300) % 7
    y[-1] = label
    with pytest.raises(ValueError, match=message), tqdm(disable=True) as bar:
        trainer(7, num_classes=7, steps=steps).run_epoch(x, y, bar)
