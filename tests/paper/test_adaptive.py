"""Gradients around SPARTA's gate against a second way to form them, and the statistics of a gate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.paper.audit import adaptive
from examples.paper.audit.gate_statistics import statistics
from examples.paper.common.gates import gates
from examples.paper.maskers.networks import hardened
from sparta_act import Sparta, SwishReLU
from sparta_act import functional as SF
from tests.helpers import reference

KINDS = [{}, {"identity": True}, {"neighborhood": 2}]  # arguments
each_kind = pytest.mark.parametrize("arguments", KINDS, ids=str)
C = 4


def drawn(**arguments):
    """A gate of all sizes."""
    return reference.scatter(Sparta(C, **arguments))


class Net(nn.Module):
    """A gate right below the network, one two levels down, and activations that are none."""

    def __init__(self, **arguments):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C)
        self.act = drawn(**arguments)
        inner = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), drawn(**arguments))
        self.blocks = nn.ModuleList([nn.Sequential(inner, nn.ReLU()), SwishReLU()])
        self.fc = nn.Linear(C * 30, 5)

    def forward(self, x):
        h = self.act(self.norm(self.conv(x)))
        for block in self.blocks:
            h = block(h)
        return self.fc(h.flatten(1))


def images(n=3, channels=3, dtype=torch.float32):
    return torch.rand(n, channels, 6, 5, dtype=dtype)


def gradient(module, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((module(x) * v).sum(), x)[0]


def off_the_kink(n=3):
    x = torch.randn(n, C, 6, 5, dtype=torch.float64)
    return x + 0.1 * x.sign(), torch.randn(n, C, 6, 5, dtype=torch.float64)


# ---- networks whose gradients go around it


@pytest.mark.parametrize("name", adaptive.SUBSTITUTES)
@each_kind
def test_the_copy_answers_as_the_network_and_the_network_stays(arguments, name):
    model, x = Net(**arguments).eval(), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    twin = adaptive.bpda(model, adaptive.SUBSTITUTES[name])
    assert torch.equal(twin(x), model(x))
    assert not torch.equal(gradient(twin, x, 1), gradient(model, x, 1))
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(twin.act) is adaptive.BPDA
    assert type(twin.blocks[0][0][1]) is adaptive.BPDA
    assert type(twin.act.sparta) is Sparta
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert not twin.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("substitute", adaptive.SUBSTITUTES.values())
def test_the_values_are_those_of_sparta_to_the_last_bit_in_every_dtype(substitute, dtype):
    model = nn.Sequential(drawn(neighborhood=2, identity=True)).to(dtype)
    x = torch.randn(2, C, 6, 5).to(dtype)
    found = adaptive.bpda(model, substitute)(x)
    assert found.dtype == dtype
    assert torch.equal(found, model(x))


def test_a_network_without_gates_is_copied():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    twin = adaptive.bpda(model, adaptive.gate_one)
    assert gates(model) == {}
    assert twin is not model
    x = images()
    assert torch.equal(twin(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_a_gate_in_two_places_is_replaced_in_both():
    sparta, (x, v) = drawn().double(), off_the_kink()
    twin = adaptive.bpda(nn.Sequential(sparta, nn.Sequential(nn.Identity(), sparta)), adaptive.gate_one)
    assert torch.equal(gradient(twin, x, v), v * (x > 0))
    assert [type(twin[0]), type(twin[1][1])] == [adaptive.BPDA] * 2
    assert twin[0].sparta is twin[1][1].sparta


def test_gates_are_found_by_their_dotted_names():
    model = Net()
    assert gates(model) == {"act": model.act, "blocks.0.0.1": model.blocks[0][0][1]}


@each_kind
def test_gate_detached_is_the_gate_as_a_constant(arguments):
    sparta, (x, v) = drawn(**arguments).double(), off_the_kink()
    twin = adaptive.bpda(nn.Sequential(sparta), adaptive.gate_detached)
    torch.testing.assert_close(gradient(twin, x, v), v * (x > 0) * sparta.attention(x))


@each_kind
def test_gate_one_is_relu(arguments):
    sparta, (x, v) = drawn(**arguments).double(), off_the_kink()
    twin = adaptive.bpda(nn.Sequential(sparta), adaptive.gate_one)
    assert torch.equal(gradient(twin, x, v), v * (x > 0))


@pytest.mark.parametrize("factor", [0.01, 0.1, 10])
@each_kind
def test_a_logit_times_a_factor_is_that_gate_with_the_logits_own_gradient(arguments, factor):
    sparta, (x, v) = drawn(**arguments).double(), off_the_kink()
    scale = 2 if sparta.identity else 1
    x.requires_grad_()
    s, c = sparta.scores(x)
    share = 1 / (1 + torch.exp(-factor * s * c)).detach()
    slope = v * x.detach().clamp(min=0) * scale * share * (1 - share)  # of the gate, not times the factor
    (through_logit,) = torch.autograd.grad((s * c * slope).sum(), x)
    expected = v * (x > 0) * scale * share + through_logit
    substitute = adaptive.SUBSTITUTES[f"logit x {factor}"]
    torch.testing.assert_close(substitute(sparta, x), x.clamp(min=0) * scale * share)
    twin = adaptive.bpda(nn.Sequential(sparta), substitute)
    torch.testing.assert_close(gradient(twin, x.detach(), v), expected)


@each_kind
def test_a_frozen_dpnet_is_an_ordinary_kernel_for_each_image(arguments):
    sparta, (x, v) = drawn(**arguments).double(), off_the_kink()
    twin = adaptive.bpda(nn.Sequential(sparta), adaptive.dpnet_frozen)
    found = gradient(twin, x, v)
    for i in range(len(x)):
        one, seen = slice(i, i + 1), F.avg_pool2d(x[i : i + 1], sparta.neighborhood, ceil_mode=True)
        state = dict(sparta.state_dict())
        kernel = F.conv2d(F.adaptive_avg_pool2d(seen, 3), state.pop("conv6"), padding=1)
        static = Sparta(C, dynamic=False, **arguments).double()
        static.load_state_dict(state | {"conv5": kernel})
        torch.testing.assert_close(static(x[one]), sparta(x[one]))
        torch.testing.assert_close(adaptive.dpnet_frozen(sparta, x[one]), sparta(x[one]))
        torch.testing.assert_close(found[one], gradient(static, x[one], v[one]))
    assert (found - gradient(sparta, x, v)).abs().max() > 1e-3


def test_without_a_dpnet_freezing_it_changes_nothing():
    sparta, (x, v) = drawn(dynamic=False).double(), off_the_kink()
    twin = adaptive.bpda(nn.Sequential(sparta), adaptive.dpnet_frozen)
    torch.testing.assert_close(gradient(twin, x, v), gradient(sparta, x, v))


def test_freezing_the_dpnet_leaves_the_module_and_its_class_alone():
    sparta, x = hardened(drawn()), torch.randn(2, C, 6, 5).requires_grad_()
    before, attributes, names = sparta(x), set(vars(sparta)), list(sparta.state_dict())
    torch.testing.assert_close(adaptive.dpnet_frozen(sparta, x), before)  # as hard
    assert set(vars(sparta)) == attributes
    assert list(sparta.state_dict()) == names
    assert torch.equal(sparta(x), before)
    torch.autograd.grad(sparta(x).sum(), sparta.conv6)  # it is in the graph again


# ---- networks without it


def test_without_its_gates_a_network_has_relus_and_with_their_means_one_number_a_channel():
    model, x = Net().eval(), images()
    found = adaptive.surrogates(model, x)
    removed, mean = found["its gates removed"], found["its gates at their mean"]
    assert not gates(removed)
    assert not gates(mean)
    assert type(removed.act) is type(removed.blocks[0][0][1]) is nn.ReLU
    before = model.norm(model.conv(x)).detach()
    on, gate = (before > 0).float(), model.act.attention(before).detach()
    expected = (gate * on).sum((0, 2, 3)) / on.sum((0, 2, 3))
    torch.testing.assert_close(mean.act.gate.flatten(), expected)
    torch.testing.assert_close(mean.act(before), F.relu(before) * expected.view(1, -1, 1, 1))
    assert len(gates(model)) == 2  # the network stays


def test_without_its_gates_a_network_has_its_own_statistics_of_batch_norm():
    torch.manual_seed(0)
    after = nn.BatchNorm2d(C)
    model, x = nn.Sequential(drawn(), after).eval(), images(channels=C)
    found = adaptive.surrogates(model, x)
    for surrogate in found.values():
        torch.testing.assert_close(surrogate[1].running_mean, surrogate[0](x).mean((0, 2, 3)))
        assert not surrogate.training
    removed, mean = (s[1].running_mean for s in found.values())
    assert (removed > mean).all()
    assert not after.running_mean.any()  # the network stays
    adaptive.surrogates(model, x[:1])  # one image is enough


def test_a_channel_that_is_never_active_has_a_gate_of_one_half():
    x = images(channels=C)
    x[:, 0] = -1
    gate = adaptive.surrogates(nn.Sequential(drawn()), x)["its gates at their mean"][0].gate.flatten()
    assert gate[0] == 0.5
    assert (gate[1:] != 0.5).all()


def test_a_gate_in_two_places_has_one_mean_in_both_and_one_that_is_never_called_is_1():
    shared, idle = drawn(), drawn()
    model = nn.Sequential(shared, nn.Conv2d(C, C, 1), shared)
    model.idle = nn.Identity()
    model.idle.gate = idle
    mean = adaptive.surrogates(model, images(channels=C))["its gates at their mean"]
    assert torch.equal(mean[0].gate, mean[2].gate)
    assert mean[0].gate.std() > 0
    assert mean.idle.gate.gate.item() == 1


def test_noisy_copies_have_the_mean_of_the_networks_logits_and_of_their_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double(), torch.rand(3, 3, 4, 4).double()
    noisy = adaptive.NoisyCopies(model, 0.1, copies=3)
    torch.manual_seed(1)
    found, slope = noisy(x), gradient(noisy, x, 1)
    torch.manual_seed(1)
    copies = [(x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1) for _ in range(3)]
    torch.testing.assert_close(found, sum(model(z) for z in copies) / 3)
    assert not torch.equal(found, model(x))
    assert slope.shape == x.shape
    step = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 5), nn.Hardtanh(0, 1e-3)
    ).double()  # flat but for ripples
    assert (gradient(adaptive.NoisyCopies(step, 0.5, 64), x, 1) != 0).double().mean() > (
        gradient(step, x, 1) != 0
    ).double().mean()


# ---- what a gate does


class Known(Sparta):
    """Of eight columns three are closed, the next nearly, one nearly open, one open and two a half."""

    def forward(self, x):
        return SF.sparta(x, *self.scores(x), 2 if self.identity else 1)

    def scores(self, x):
        row = torch.tensor([-10.0, -10.0, -10.0, -3.0, 4.0, 10.0, 0.0, 0.0])
        s = row.expand(len(x), 1, x.shape[2], 8)
        return s, torch.ones(len(x), self.in_channels, 1, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("identity", [False, True])
def test_a_gate_we_know_is_counted_and_its_gradient_measured(identity, batch_size):
    model = nn.Sequential(Known(2, identity=identity), nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.rand(5, 2, 3, 8), torch.tensor([0, 1, 2, 0, 1])
    found = statistics(model, x, y, batch_size)
    assert list(found) == ["0"]
    share = found["0"]
    assert share.closed.tolist() == [3 / 8] * 5
    assert share.open.tolist() == [1 / 8] * 5
    counts = dict.fromkeys(range(50), 0) | {0: 90, 2: 30, 49: 60, 25: 60}
    assert share.histogram.tolist() == list(counts.values())
    with torch.no_grad():
        probability = model(x).softmax(1) - F.one_hot(y, 3)
        above = (probability @ model[2].weight).view(x.shape)  # of the cross-entropy; every pixel is positive
        s, c = model[0].scores(x)
        passed = above * torch.sigmoid(s * c) * (2 if identity else 1)
    expected = passed.flatten(1).norm(dim=1) / above.flatten(1).norm(dim=1)
    torch.testing.assert_close(share.ratio, expected.double(), rtol=1e-4, atol=0)
    assert share.ratio.std() > 1e-3  # image by image


@each_kind
def test_each_site_is_compared_with_a_relu_in_its_place(arguments):
    model, x, y = Net(**arguments).eval().double(), images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    found = statistics(model, x, y, batch_size=3)
    assert list(found) == ["act", "blocks.0.0.1"]
    conv, sparta = model.blocks[0][0]

    def loss_after(h):
        logits = model.fc(model.blocks[1](F.relu(h)).flatten(1))
        return F.cross_entropy(logits, y, reduction="sum")

    inside = conv(model.act(model.norm(model.conv(x)))).detach().requires_grad_()
    (passed,) = torch.autograd.grad(loss_after(sparta(inside)), inside)
    output = sparta(inside).detach().requires_grad_()
    (above,) = torch.autograd.grad(loss_after(output), output)
    by_relu = above * (inside > 0)
    ratio = torch.stack([a.norm() / b.norm() for a, b in zip(passed, by_relu, strict=True)])
    torch.testing.assert_close(found["blocks.0.0.1"].ratio, ratio, rtol=1e-6, atol=0)
    values = sparta.attention(inside) / (2 if sparta.identity else 1)
    for share, hit in (
        (found["blocks.0.0.1"].closed, values < 0.01),
        (found["blocks.0.0.1"].open, values > 0.99),
    ):
        torch.testing.assert_close(share, hit.float().mean((1, 2, 3)))
    for share in found.values():
        assert share.closed.shape == share.open.shape == share.ratio.shape == (4,)
        assert share.histogram.shape == (50,)
        assert share.histogram.sum() == 4 * C * 30


def test_a_fresh_identity_is_half_open_and_passes_on_what_relu_does():
    model = nn.Sequential(nn.Conv2d(3, C, 1), Sparta(C, identity=True), nn.Flatten(), nn.Linear(C * 30, 5))
    share = statistics(model, images(), torch.tensor([0, 1, 2]))["1"]
    assert share.closed.tolist() == share.open.tolist() == [0, 0, 0]
    torch.testing.assert_close(share.ratio, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert share.histogram[25] == share.histogram.sum() == 3 * C * 30


def test_where_there_is_no_gradient_from_above_the_ratio_is_a_number():
    model = nn.Sequential(drawn(), nn.Flatten(), nn.Linear(C * 30, 5))
    nn.init.zeros_(model[2].weight)
    share = statistics(model, images(channels=C), torch.tensor([0, 1, 2]))["0"]
    assert share.ratio.tolist() == [1, 1, 1]  # nothing is lost


def test_a_network_without_gate_has_no_statistics():
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 5))
    assert statistics(model, images(), torch.tensor([0, 1, 2])) == {}


def test_a_gate_that_is_called_twice_is_looked_at_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = Known(2), nn.Linear(48, 3)

        def forward(self, x):
            return self.fc(self.act(self.act(x) - 0.3).flatten(1))

    model, x, y = Twice(), torch.rand(5, 2, 3, 8), torch.tensor([0, 1, 2, 0, 1])
    found = statistics(model, x, y, batch_size=2)
    assert list(found) == ["act", "act #2"]
    last = nn.Sequential(model.act, nn.Flatten(), model.fc)
    alone = statistics(last, model.act(x).detach() - 0.3, y)["0"]
    torch.testing.assert_close(found["act #2"].ratio, alone.ratio)
    assert not torch.equal(found["act"].ratio, found["act #2"].ratio)
    assert all(f.histogram.sum() == 5 * 48 for f in found.values())


def test_a_gate_whose_answer_nobody_uses_has_no_statistics():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.fc = drawn(), drawn(), nn.Linear(C * 30, 5)

        def forward(self, x):
            self.unused(x)
            return self.fc(self.used(x).flatten(1))

    found = statistics(Unused(), images(channels=C), torch.tensor([0, 1, 2]))
    assert list(found) == ["used"]


def test_a_gate_that_is_never_called_has_no_statistics():
    model = Net()
    model.spare = Sparta(C)
    assert list(statistics(model, images(), torch.tensor([0, 1, 2]))) == ["act", "blocks.0.0.1"]


def test_images_and_network_are_left_as_they_were():
    model, x, y = Net().train(), images(), torch.tensor([0, 1, 2])
    model.act.eval().requires_grad_(False)
    before, images_before = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    statistics(model, x, y)
    with pytest.raises(RuntimeError):
        statistics(model, x[:, :, :3], y)  # the last layer cannot take them
    assert torch.equal(x, images_before)
    assert not x.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_sites_are_seen_in_evaluation_mode():
    model, x, y = Net().train(), images(), torch.tensor([0, 1, 2])
    found = statistics(model, x, y)["act"]
    assert torch.equal(found.ratio, statistics(model.eval(), x, y)["act"].ratio)
