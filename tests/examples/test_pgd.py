import pytest
import torch
from torch import nn

from examples import pgd
from examples.paper.attacks import pgd as paper
from examples.paper.common.models import ResNet
from sparta_act import replace_relus

ATTACK = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 3}


@pytest.mark.parametrize("targeted", [False, True])
def test_the_laboratorys_pgd_makes_the_same_images(targeted):
    model = replace_relus(ResNet("resnet18", width=4), "G*.B-1")
    model(torch.rand(8, 3, 16, 16))  # running statistics
    model = model.double().eval()
    x, y = torch.rand(5, 3, 16, 16, dtype=torch.float64), torch.arange(5)
    torch.manual_seed(1)
    theirs = paper.pgd(model, x, y, targeted=targeted, **ATTACK)
    torch.manual_seed(1)
    target = pgd.random_targets(y, 10) if targeted else None
    assert torch.equal(pgd.pgd(model, x, y, target=target, **ATTACK), theirs)


@pytest.mark.parametrize("target", [None, torch.tensor([2, 2])])
def test_on_a_linear_network_it_finds_the_best_corner(target):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0, 0])
    with torch.no_grad():  # the loss of class 0 rises, and that of class 2 falls, along this direction alone
        model[1].weight.copy_(torch.stack([-model[1].weight[2], torch.zeros(12), model[1].weight[2]]))
    found = pgd.pgd(model, x, y, eps=0.1, step_size=0.05, steps=8, target=target)
    direction = model[1].weight[2].detach().sign().view(3, 2, 2)
    torch.testing.assert_close(found, (x + 0.1 * direction).clamp(0, 1))
    assert all(p.grad is None for p in model.parameters())


def test_images_outside_0_to_1_are_refused():
    for bad in (torch.full((1, 3, 4, 4), -0.1), torch.full((1, 3, 4, 4), 1.1)):
        with pytest.raises(
            ValueError, match=r"must lie in \[0, 1\], not in .*: normalize inside the network"
        ):
            pgd.pgd(nn.Flatten(), bad, torch.tensor([0]), **ATTACK)


def test_a_random_target_is_every_other_class():
    y = torch.arange(3).repeat(200)
    targets = pgd.random_targets(y, 3)
    assert (targets != y).all()
    assert {*targets.tolist()} == {0, 1, 2}
