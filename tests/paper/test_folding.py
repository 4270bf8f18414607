import copy

import pytest
import torch
from torch import nn

from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import pgd
from examples.paper.common.models import build


def trained_like(model):
    """Random statistics and weights in every batch norm, as after training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("activation", ["relu", "sparta"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_resnet_loses_every_norm_and_keeps_its_logits(activation, memory_format):
    model = trained_like(build("resnet18", activation, "G*.B-1", width=8)).to(memory_format=memory_format)
    x = torch.rand(3, 3, 32, 32)
    twin = folded(model, x[:1])
    assert norms(model) == 20
    assert norms(twin) == 0
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert not twin.training
    assert twin.fc.weight is model.fc.weight


def test_float64_logits_are_equal_up_to_rounding():
    model, x = (
        trained_like(build("resnet34", "relu", "G*.B-1", width=8)).double(),
        torch.rand(2, 3, 32, 32).double(),
    )
    torch.testing.assert_close(folded(model, x)(x), model(x), rtol=1e-11, atol=1e-12)


def test_autocast_does_not_prevent_folding():
    model, x = trained_like(build("resnet18", "relu", "G*.B-1", width=8)), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert norms(folded(model, x)) == 0


class Odd(nn.Module):
    """Two norms: one follows a convolution, the test places the other."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.conv2, self.norm2 = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )
        self.use = use

    def forward(self, x):
        return self.use(self, self.norm(self.conv(x))).flatten(1)


def twice_the_conv(m, x):
    return m.norm2(m.conv2(m.conv2(x)))


def twice_the_norm(m, x):
    return m.norm2(m.norm2(m.conv2(x)))


def something_between(m, x):
    return m.norm2(m.conv2(x) + 1)


def norm_first(m, x):
    return m.conv2(m.norm2(x))


@pytest.mark.parametrize("use", [twice_the_conv, twice_the_norm, something_between, norm_first])
def test_what_does_not_fold_stays(use):
    model, x = trained_like(Odd(use)), torch.rand(2, 3, 8, 8)
    twin = folded(model, x)
    assert norms(twin) == 1
    assert type(twin.norm) is nn.Identity
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


def result_read_twice(m, x):
    y = m.conv2(x)
    return m.norm2(y) + y


def changed_in_place(m, x):
    return m.norm2(m.conv2(x).relu_()) * 1e-9 + 1


def past_the_gradient(m, x):
    y = m.conv2(x)
    return m.norm2(y).detach() + (y - y.detach())


@pytest.mark.parametrize("use", [result_read_twice, changed_in_place, past_the_gradient])
def test_an_output_that_others_read_too_is_not_folded(use):
    model, x = trained_like(Odd(use)), torch.rand(2, 3, 8, 8)
    twin = folded(model, x)
    assert type(twin.norm) is nn.Identity
    assert type(twin.norm2) is nn.BatchNorm2d


def reads_the_statistics(m, x):
    return m.norm2(m.conv2(x)) * m.norm2.running_var[0]


def random_answer(m, x):
    return m.norm2(m.conv2(x)) + torch.randn_like(x)


def one_image_differs(m, x):
    y = m.norm2(m.conv2(x))
    return y.view(1, -1, *y.shape[2:]).view_as(y)  # not in channels_last, from two images on


@pytest.mark.parametrize("use", [reads_the_statistics, random_answer, one_image_differs])
def test_a_network_that_folding_would_change_is_returned_as_it_is(use):
    model, x = trained_like(Odd(use)), torch.rand(2, 3, 8, 8)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert folded(model, x) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_pre_hook"])
def test_a_network_with_hooks_is_not_folded(register):
    model = trained_like(Odd(norm_first))
    getattr(model.conv2, register)(lambda *_: None)
    assert folded(model, torch.rand(2, 3, 8, 8)) is model


def test_a_network_that_copies_as_itself_is_not_folded():
    class Single(Odd):
        def __deepcopy__(self, memo):
            return self

    model = trained_like(nn.Sequential(Single(norm_first)))
    assert folded(model, torch.rand(2, 3, 8, 8)) is model
    assert norms(model) == 2


def test_a_norm_that_stays_in_training_mode_stays():
    model = trained_like(Odd(norm_first))
    model.norm.train = lambda mode=True: model.norm
    model.norm.training = True
    twin = folded(model, torch.rand(2, 3, 8, 8))
    assert norms(twin) == 2


def test_a_compiled_network_is_not_folded():
    model = Odd(norm_first).eval()
    compiled = torch.compile(model, backend="eager")
    assert folded(compiled, torch.rand(2, 3, 8, 8)) is compiled
    model.compile(backend="eager")
    assert folded(model, torch.rand(2, 3, 8, 8)) is model


def test_a_network_that_cannot_be_copied_is_attacked_itself():
    class Uncopied(Odd):
        def __deepcopy__(self, memo):
            raise RuntimeError("cannot be copied")

    model, x = Uncopied(norm_first), torch.rand(2, 3, 8, 8)
    x_adv = pgd(model, x, torch.tensor([0, 1]), eps=0.1, step_size=0.1, steps=1)
    assert (x_adv != x).any()
