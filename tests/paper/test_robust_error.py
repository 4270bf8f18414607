import pytest
import torch
from torch import nn

from examples.paper.attacks import losses
from examples.paper.attacks.pgd import attacking, pgd_steps
from examples.paper.attacks.robust_error import dlr_errors, first_breaks, likeliest_wrong, robust_errors


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()


def images(n=60):
    return torch.rand(n, 3, 6, 6, dtype=torch.float64)


def without_early_stopping(model, x, y, *, eps, step_size, steps):
    """Attack every image to the last step and evaluate the network at each."""
    wrong = model(x).argmax(1) != y
    (left,) = torch.where(~wrong)
    start = (x[left] + torch.empty_like(x[left]).uniform_(-eps, eps)).clamp(0, 1)
    with attacking(model):
        run = pgd_steps(model, x[left], y[left], eps=eps, step_size=step_size, steps=steps, start=start)
        for x_adv in (start, *(image for image, _ in run)):
            wrong[left] |= model(x_adv).argmax(1) != y[left]
    return wrong


@pytest.mark.parametrize("batch_size", [1, 7, 60, 1000])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_same_images_as_all_steps_on_all_images(batch_size, steps):
    model, x = net().eval(), images()
    y = model(x).argmax(1)
    y[:9] = (y[:9] + 1) % 5  # some wrong from the start
    attack = {"eps": 0.03, "step_size": 0.006, "steps": steps}
    torch.manual_seed(1)
    expected = without_early_stopping(model, x, y, **attack)
    torch.manual_seed(1)
    found = robust_errors(model, x, y, batch_size=batch_size, **attack)
    assert torch.equal(found, expected)
    assert expected[:9].all()
    assert 9 < expected.sum() < 60


def test_a_broken_image_is_not_attacked_again():
    model, x, seen = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).double(), images(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]) * inputs[0].requires_grad))
    y = model(x).argmax(1)
    wrong = robust_errors(model, x, y, eps=0.9, step_size=0.3, steps=50, batch_size=10)
    assert wrong.float().mean() > 0.8
    assert 60 <= sum(seen) < 60 * 50 / 2
    assert max(seen) == 10


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_targeted_dlr_goes_to_the_likeliest_wrong_classes_in_turn(batch_size):
    model, x, eps = net().eval(), images(), 0.02
    y = model(x).argmax(1)
    y[:9] = (y[:9] + 1) % 5
    targets = likeliest_wrong(model, x, y, 3, batch_size)
    for logits, label, classes in zip(model(x), y, targets, strict=True):
        order = [k for k in logits.sort(descending=True).indices.tolist() if k != label]
        assert classes.tolist() == order[:3]
    torch.manual_seed(1)
    expected = model(x).argmax(1) != y
    with attacking(model):
        for target in targets.unbind(1):
            (left,) = torch.where(~expected)
            start = (x[left] + torch.empty_like(x[left]).uniform_(-eps, eps)).clamp(0, 1)
            goals = (y[left], target[left])
            when, _ = first_breaks(
                model, model, x[left], start, losses.dlr_to, goals, eps=eps, step_size=0.005, steps=6
            )
            expected[left] = when >= 0
    torch.manual_seed(1)
    found = dlr_errors(model, x, y, eps=eps, step_size=0.005, steps=6, batch_size=batch_size)
    assert torch.equal(found, expected)
    assert 9 < expected.sum() < 60


# ---- one run, image by image


def linear(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(108, classes, bias=False)).double()


def gray(n=40):
    return 0.5 + 0.05 * (images(n) - 0.5)  # no ball of these tests is clipped


RUN = {"eps": 0.3, "step_size": 0.002, "steps": 30}


def run(model, x, start, loss, goals, fast=None, **attack):
    fast = model if fast is None else fast
    with attacking(model), attacking(fast):
        return first_breaks(model, fast, x, start, loss, goals, **RUN | attack)


@pytest.mark.parametrize("batch_size", [1, 7, 250])
def test_a_linear_network_breaks_at_the_step_that_its_margin_says(batch_size):
    model, x = linear(2), gray()
    y = model(x).argmax(1)
    w = model[1].weight
    way = (w[1 - y] - w[y]).detach()
    gap = -(way * x.flatten(1)).sum(1)
    due = (gap / (0.002 * way.abs().sum(1))).floor().long() + 1  # the first step past the boundary
    expected = torch.where(due <= 9, due, -1)
    assert 0 < (expected < 0).sum() < 40
    assert len(expected.unique()) > 2
    when, found = run(model, x, x, losses.cross_entropy, (y,), steps=9, batch_size=batch_size)
    assert torch.equal(when, expected)
    taken = torch.where(due <= 9, due, 9).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, x + 0.002 * taken * way.sign().view_as(x))
    assert torch.equal(model(found).argmax(1) != y, when >= 0)


def test_an_image_that_is_wrong_at_the_start_broke_after_no_step():
    model, x = linear(), gray(6)
    y = model(x).argmax(1)
    start = x.clone()
    start[:2] += 0.2 * torch.rand_like(x[:2])
    y[:2] = (model(start).argmax(1)[:2] + 1) % 3
    when, found = run(model, x, start, losses.cw, (y,), steps=1)
    assert when[:2].tolist() == [0, 0]
    assert torch.equal(found[:2], start[:2])


def test_the_images_stay_in_the_ball_and_the_arguments_unchanged():
    model, x = linear(), images().round()  # black and white
    y, start = model(x).argmax(1), x.clone()
    before = x.clone(), y.clone()
    when, found = run(model, x, start, losses.cw, (y,), eps=0.05, step_size=0.03)
    assert (found - x).abs().max() <= 0.05 + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(x, before[0])
    assert torch.equal(start, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(model(found).argmax(1) != y, when >= 0)


def test_only_the_network_itself_decides_what_is_broken():
    model, other, x = linear(), linear(), images()
    y = model(x).argmax(1)
    when, found = run(model, x, x, losses.cross_entropy, (y,), fast=other)
    assert (other(x).argmax(1) != y).any()
    assert not (when == 0).any()
    assert torch.equal(model(found).argmax(1) != y, when >= 0)


def test_where_the_fast_network_never_errs_the_last_images_are_evaluated():
    class NeverWrong(nn.Module):
        """Gradients of the network, and a true class that always wins by far."""

        def forward(self, x):
            z = model(x)
            return z + 1e6 * nn.functional.one_hot(y, 3) - z.detach()

    model, x = linear(), gray()
    y = model(x).argmax(1)
    when, found = run(model, x, x, losses.cw, (y,), fast=NeverWrong())
    errs = model(found).argmax(1) != y
    assert torch.equal(when, torch.where(errs, 30, -1))
    assert errs.any()


@pytest.mark.parametrize("loss", [losses.cw_to, losses.cross_entropy_to])
def test_targets_go_with_their_images(loss):
    model, x = linear(), gray()
    y = model(x).argmax(1)
    target = (y + 1 + torch.arange(40) % 2) % 3
    when, found = run(model, x, x, loss, (y, target), step_size=1e-6, batch_size=7)
    w = model[1].weight.detach()
    if loss is losses.cw_to:
        way = (w[target] - w[y]).sign().view_as(x)
    else:  # the target's weights minus the mean of all, weighted by their probabilities
        p = model(x).softmax(1)[:, :, None]
        way = (w[target] - (p * w).sum(1)).sign().view_as(x)
    right = (found - x - 30e-6 * way).abs() < 1e-9
    assert (when == -1).all()
    assert right.double().mean() > (1 - 1e-12 if loss is losses.cw_to else 0.99)


def test_no_images_break_nowhere():
    empty = torch.zeros(0, dtype=torch.long)
    when, found = run(linear(), images(0), images(0), losses.cw, (empty,))
    assert when.shape == (0,)
    assert found.shape == (0, 3, 6, 6)
