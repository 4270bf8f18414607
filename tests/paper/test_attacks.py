import pytest
import torch
from torch import nn

from examples.paper.attacks.pgd import attacking, pgd, pgd_at, pgd_steps, random_targets


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


@pytest.mark.parametrize("targeted", [False, True])
def test_it_stays_in_the_ball_and_among_images(targeted):
    x, y = torch.rand(5, 3, 6, 6).round(), torch.arange(5)  # images at 0 and 1: the corners
    x_adv = pgd(small_net(), x, y, eps=8 / 255, step_size=4 / 255, steps=3, targeted=targeted)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv != x).any(dim=(1, 2, 3)).all()


def test_without_random_start_it_is_deterministic():
    model, x, y = small_net(), torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
    a, b = (pgd(model, x, y, eps=0.1, step_size=0.1, steps=1, random_start=False) for _ in range(2))
    assert torch.equal(a, b)


def test_targets_are_uniform_over_the_other_classes():
    y = torch.arange(10).repeat(9000)
    targets = random_targets(y, 10)
    assert (targets != y).all()
    counts = torch.zeros(10, 10).index_put_((y, targets), torch.ones(()), accumulate=True)
    assert counts[~torch.eye(10, dtype=torch.bool)].sub(1000).abs().max() < 150  # five deviations


def test_the_model_is_restored():
    model = small_net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pgd(model, torch.rand(2, 3, 6, 6), torch.tensor([0, 1]), eps=0.1, step_size=0.1, steps=2)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batch_norm_is_in_evaluation_mode_and_parameters_have_no_gradient_meanwhile():
    model = small_net().train()
    with attacking(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


def test_batch_statistics_in_the_attack_do_not_change_the_running_ones():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    x = torch.rand(6, 3, 4, 4)
    model(x)
    frozen = nn.BatchNorm2d(4).eval()
    model.insert(2, frozen)
    model.train()
    frozen.eval()
    expected = model[1](model[0](x))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with attacking(model, batch_statistics=True):
        torch.testing.assert_close(model[1](model[0](x)), expected)
        assert not model[2].training
        assert not any(p.requires_grad for p in model.parameters())
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert model[1].training
    assert model[1].momentum == 0.1
    with attacking(model):
        assert not torch.allclose(model[1](model[0](x)), expected)


def test_a_given_start_is_where_the_attack_begins():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.full((2, 3, 2, 2), 0.5)
    start, y = x + 0.05, torch.tensor([0, 1])
    run = pgd_steps(model, x, y, eps=0.1, step_size=0.01, steps=1, start=start)
    ((x_adv, loss),) = run
    torch.testing.assert_close((x_adv - start).abs(), torch.full_like(x, 0.01))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(start), y, reduction="none"))


def test_the_beginning_of_a_run_is_the_attack_of_fewer_steps():
    model, x, y = small_net(), torch.rand(3, 3, 6, 6), torch.tensor([0, 1, 2])
    arguments = {"eps": 0.1, "step_size": 0.03, "targeted": True}
    torch.manual_seed(1)
    on_the_way = pgd_at(model, x, y, steps=[5, 2], **arguments)
    assert list(on_the_way) == [2, 5]
    for steps, images in on_the_way.items():
        torch.manual_seed(1)
        assert torch.equal(images, pgd(model, x, y, steps=steps, **arguments))
    assert not torch.equal(on_the_way[2], on_the_way[5])
    for none in ([], [0, 3]):
        with pytest.raises(ValueError, match="at least 1"):
            pgd_at(model, x, y, steps=none, **arguments)


class Recording(nn.Module):
    """Records the precision of its logits, with and without gradients."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = small_net(), set()

    def forward(self, x):
        y = self.net(x)
        self.seen.add((y.dtype, torch.is_grad_enabled()))
        return y


def test_with_amp_the_network_answers_in_bfloat16_and_images_keep_their_precision():
    x, y = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    steps_in = {}
    for amp in (False, True):
        model = Recording().eval()
        *_, (x_adv, loss) = pgd_steps(model, x, y, eps=0.1, step_size=0.03, steps=2, amp=amp)
        assert (x_adv.dtype, loss.dtype) == (torch.float32, torch.float32)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        steps_in[amp] = model.seen
    assert steps_in == {False: {(torch.float32, True)}, True: {(torch.bfloat16, True)}}
