"""The activations, fast form against slow twin, and everything PyTorch may do to a module."""

import copy
import functools
import inspect
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparta_act import functional as SF
from sparta_act.activations import Sparta, SwishReLU
from sparta_act.errors import ShapeError, SpartaError
from tests.helpers import reference

SHAPES = [(2, 3, 3, 3), (1, 2, 1, 1), (3, 2, 5, 3), (1, 3, 2, 7), (2, 2, 7, 2), (2, 1, 4, 4), (1, 4, 1, 6)]
ARGUMENTS = [{}, {"hidden": 2}, {"identity": True}, {"dynamic": False}, {"neighborhood": 2}]
HALVES = [torch.float16, torch.bfloat16]


def normal(*shape, seed=1, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def off_the_kink(*shape):
    x = normal(*shape, dtype=torch.float64)
    return (x + 0.1 * x.sign()).requires_grad_()


def gradients(module, x):
    """Output and gradients of a weighted sum of it: input first, then the parameters that learn."""
    x = x.detach().requires_grad_()
    y = module(x)
    v = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return [y, *torch.autograd.grad((y * v).sum(), [x, *(p for p in module.parameters() if p.requires_grad)])]


# ---- the formulas


def twin_of(module):
    """The slow form with the module's arguments."""
    n, scale = module.neighborhood, 2 if module.identity else 1
    return lambda x, p: reference.sparta(x, p, n, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "arguments", [*ARGUMENTS, {"neighborhood": 4, "hidden": 1, "dynamic": False, "identity": True}], ids=str
)
def test_fast_form_is_the_twin(arguments, shape):
    module = reference.scatter(Sparta(shape[1], **arguments)).double()
    x = normal(*shape, dtype=torch.float64)
    reference.assert_same(module, twin_of(module), x)
    reference.assert_same(module, twin_of(module), x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_no_samples_give_no_samples(arguments):
    module = reference.scatter(Sparta(3, **arguments))
    for size in ((4, 5), (3, 3), (1, 1)):
        y, grad_x, *rest = gradients(module, torch.zeros(0, 3, *size))
        assert y.shape == grad_x.shape == module.attention(grad_x).shape == (0, 3, *size)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in rest)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_identity_is_the_long_way(shape):
    x, c = normal(*shape, dtype=torch.float64), shape[1]
    weight, kernel = (normal(*s, seed=2, dtype=torch.float64) for s in [(c, c, 3, 3), (shape[0], 1, 3, 3)])
    s, scale = x[:, :1], normal(shape[0], c, 1, 1, seed=3, dtype=torch.float64)
    conv, gate = reference.conv, reference.sigmoid(s * scale)
    own = torch.cat([conv(s[n : n + 1], kernel[n : n + 1]) for n in range(len(x))])
    for fast, slow in [
        (SF.full_conv(SF.pool(x), weight), conv(reference.pool(x), weight, padding=0)),
        (SF.pool(x), reference.pool(x)),
        (SF.kernel_conv(s, kernel), own),
        (SF.kernel_conv(s, kernel[:1]), conv(s, kernel[:1])),
        (
            SF.normalize(x, (2, 3)),
            torch.stack([reference.normalized(t) for t in x.flatten(0, 1)]).view(shape),
        ),
        (SF.normalize(x, (1, 2, 3)), torch.stack([reference.normalized(t) for t in x])),
        (
            SF.share(s, 2, torch.Size(shape[2:])),
            s[..., torch.arange(shape[2]) // 2, :][..., torch.arange(shape[3]) // 2],
        ),
        (SF.attention(s, scale), gate),
        (SF.attention(s, scale, 2), 2 * gate),
        (SF.sparta(x, s, scale), reference.relu(x) * gate),
        (SF.sparta(x, s, scale, 2), reference.relu(x) * gate * 2),
        (SF.swish_relu(x), reference.swish_relu(x)),
    ]:
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (1, 3, 1, 4)])
@pytest.mark.parametrize("n", [10, 10**4, 10**9, 2**63, 10**30])
def test_neighborhoods_larger_than_the_map_are_the_whole_map(n, shape):
    """And take no more memory."""
    x = normal(*shape).double()
    module, other = (reference.scatter(Sparta(3, neighborhood=k)).double() for k in (n, 9))
    torch.testing.assert_close(SF.average(x, n), x.mean((2, 3), keepdim=True), rtol=1e-12, atol=1e-14)
    assert torch.equal(module(x), other(x))
    torch.testing.assert_close(gradients(module, x), gradients(other, x))


def test_normalize_keeps_the_digits_beside_a_large_mean():
    t = normal(2, 3, 4, 5)
    torch.testing.assert_close(SF.normalize(t + 1e3, (2, 3)), SF.normalize(t, (2, 3)), rtol=0, atol=1e-3)
    assert SF.normalize(t.half() * 1e4, (2, 3)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"hidden": 3}], ids=str)
def test_scores_have_mean_0_and_variance_1(arguments, channels):
    """What keeps the gate from sleeping or saturating, for any size of weights and images."""
    module = Sparta(channels, **arguments).double()
    with torch.no_grad():
        for weight in (module.conv2, module.conv4):
            weight.mul_(100)
    s, c = module.scores(5 * normal(3, channels, 8, 7).double() + 2)
    torch.testing.assert_close(s.mean((1, 2, 3)), torch.zeros(3).double())
    torch.testing.assert_close(s.var((1, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(c.mean((1, 2, 3)), torch.zeros(3).double())
    one = torch.full((3,), float(channels > 1)).double()
    torch.testing.assert_close(c.var((1, 2, 3), correction=0), one, rtol=0, atol=0.01)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (2, 1, 5, 6), (1, 1, 1, 1)])
def test_one_place_or_one_channel_has_gate_one_half(shape, identity):
    module, x = reference.scatter(Sparta(shape[1], identity=identity)), normal(*shape)
    gate = module.attention(x)
    assert torch.equal(gate, torch.full_like(x, 1.0 if identity else 0.5))
    y, *all_gradients = gradients(module, x)
    assert torch.equal(y, F.relu(x) * gate)
    assert all(g.isfinite().all() for g in all_gradients)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_output_is_relu_times_attention(dtype, identity):
    module = reference.scatter(Sparta(4, identity=identity)).to(dtype)
    x = normal(2, 4, 5, 3, dtype=dtype)
    gate = module.attention(x)
    assert gate.dtype == torch.promote_types(dtype, torch.float32)
    assert gate.min() >= 0
    assert gate.max() <= (2 if identity else 1)
    assert gate.std() > 0.05
    assert torch.equal(module(x), (F.relu(x) * gate).to(dtype))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 2, 5, 7), (2, 4, 8, 6)])
def test_the_scores_are_the_gates_logit(shape, n):
    module, x = reference.scatter(Sparta(shape[1], neighborhood=n)), normal(*shape)
    s, c = module.scores(x)
    assert s.shape == (shape[0], 1, *shape[2:])
    assert c.shape == (*shape[:2], 1, 1)
    assert torch.equal(module.attention(x), torch.sigmoid(s * c))
    assert torch.equal(module(x), F.relu(x) * torch.sigmoid(s * c))
    if n > 1:  # both see X averaged, s is normalized, and then neighbors share a score
        alone = Sparta(shape[1])
        alone.load_state_dict(module.state_dict())
        small, channel = alone.scores(F.avg_pool2d(x, n, ceil_mode=True))
        assert torch.equal(c, channel)
        for i in range(shape[2]):
            for j in range(shape[3]):
                assert torch.equal(s[:, :, i, j], small[:, :, i // n, j // n])


def test_the_scores_are_the_twins():
    module, x = reference.scatter(Sparta(3)).double(), normal(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module.scores(x), reference.scores(x, module.state_dict()))


def test_the_scores_pass_gradients_on():
    module, x = reference.scatter(Sparta(3)), normal(2, 3, 4, 5).requires_grad_()
    for score in module.scores(x):
        assert torch.autograd.grad(score.pow(3).sum(), x, retain_graph=True)[0].abs().max() > 1e-3


@pytest.mark.parametrize(("c", "h"), [(1, 8), (16, 8), (64, 8), (80, 10), (128, 16), (256, 32), (512, 32)])
def test_hidden_is_an_eighth_of_the_channels_from_8_to_32(c, h):
    with torch.device("meta"):
        module, given, plain = Sparta(c), Sparta(c, hidden=5), Sparta(c, dynamic=False)
    square = {"conv1": (h, c, 3, 3), "conv2": (c, h, 3, 3), "conv3": (h, c, 3, 3), "conv4": (1, h, 3, 3)}
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == square | {"conv6": (1, c, 3, 3), "gain": (1,)}
    assert {name: tuple(p.shape) for name, p in plain.named_parameters()} == square | {
        "conv5": (1, 1, 3, 3),
        "gain": (1,),
    }
    assert (module.hidden, given.hidden, given.conv1.shape[0]) == (h, 5, 5)
    assert not list(module.buffers())  # no running statistics


# ---- ReLU at the start


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"neighborhood": 2}, {"hidden": 3}], ids=str)
def test_a_fresh_identity_is_relu(arguments, dtype, memory_format):
    module = Sparta(4, identity=True, **arguments).to(dtype)
    x = normal(2, 4, 5, 6, dtype=dtype).contiguous(memory_format=memory_format)
    x[:, 1] = 0
    found, expected = gradients(module, x), gradients(nn.ReLU(), x)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected, strict=True))
    assert torch.equal(module.attention(x), torch.ones_like(x, dtype=module.attention(x).dtype))
    learns = dict(zip([n for n, _ in module.named_parameters()], found[2:], strict=True))
    assert learns["gain"].abs() > 0  # and so can leave it


# ---- derivatives


def test_gradcheck_of_the_gate():
    inputs = off_the_kink(2, 3, 3, 3), off_the_kink(2, 1, 3, 3), off_the_kink(2, 3, 1, 1)
    for scale in (1, 2):
        assert gradcheck(lambda *t, scale=scale: SF.sparta(*t, scale), inputs)
        assert gradgradcheck(lambda *t, scale=scale: SF.sparta(*t, scale), inputs)
    assert gradcheck(SF.swish_relu, inputs[:1])
    assert gradgradcheck(SF.swish_relu, inputs[:1])


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (1, 3, 1, 4)])
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"identity": True, "dynamic": False}], ids=str)
def test_gradcheck_of_the_module(arguments, shape):
    module = reference.scatter(Sparta(shape[1], **arguments)).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def call(x, *values):
        return functional_call(module, dict(zip(names, values, strict=True)), x)

    assert gradcheck(call, (off_the_kink(*shape), *values), fast_mode=True)
    assert gradgradcheck(call, (off_the_kink(*shape), *values), fast_mode=True)


def test_the_kink_is_zero_with_gradient_zero():
    x = torch.tensor([0.0, -0.0]).repeat(8).view(1, 4, 2, 2).requires_grad_()
    s, c = torch.full((1, 1, 2, 2), 2.0, requires_grad=True), torch.ones(1, 4, 1, 1, requires_grad=True)
    y = SF.sparta(x, s, c)
    for tensor in (y, *torch.autograd.grad(y.sum(), (x, s, c))):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    y = SF.swish_relu(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(y))
    plain = reference.scatter(Sparta(4)).double()
    mixed = normal(1, 4, 2, 2, dtype=torch.float64)
    mixed[:, ::2] = 0  # the module's own kinks lie at other places, so its twin must still agree
    reference.assert_same(plain, reference.sparta, mixed)
    assert torch.equal(plain(mixed)[:, ::2], torch.zeros(1, 2, 2, 2, dtype=torch.float64))


def test_gradients_do_not_depend_on_who_else_asks():
    module, x = reference.scatter(Sparta(3)).double(), normal(2, 3, 4, 5, dtype=torch.float64)
    _, *both = gradients(module, x)
    only_parameters = torch.autograd.grad(
        (module(x) * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum(), list(module.parameters())
    )
    only_input = gradients(module.requires_grad_(False), x)[1:]
    torch.testing.assert_close(list(only_parameters), both[1:])
    torch.testing.assert_close(only_input, both[:1])


def test_gate_keeps_one_large_tensor():
    x = normal(2, 8, 6, 6).requires_grad_()
    s, c = normal(2, 1, 6, 6).requires_grad_(), normal(2, 8, 1, 1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        SF.sparta(x, s, c)
    assert sorted(kept) == sorted([x.numel(), s.numel(), c.numel()])


# ---- numbers: types, sizes, order


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_every_dtype_comes_back(dtype, n):
    wide, x = reference.scatter(Sparta(4, neighborhood=n)).train(), normal(2, 4, 5, 6)
    narrow = copy.deepcopy(wide).to(dtype)
    y, *all_gradients = gradients(narrow, x.to(dtype))
    assert {t.dtype for t in (y, *all_gradients)} == {dtype}
    torch.testing.assert_close(y.float(), wide(x), rtol=0.1, atol=0.1)
    assert all(g.isfinite().all() for g in all_gradients)
    assert torch.equal(SwishReLU()(x.to(dtype)), F.relu(x.to(dtype)) * torch.sigmoid(x.to(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_logit_is_formed_in_float32(dtype):
    module, x = Sparta(4), torch.randint(-2, 3, (2, 4, 5, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # small whole numbers: the half precision convolutions are exact, the rest is not
        for name, weight in module.named_parameters():
            weight.copy_(torch.randint(-1, 2, weight.shape) if name != "gain" else torch.ones(1))
        module.conv1.zero_()[:, :, 1, 1] = 1  # of the means, no whole numbers, it makes some
    x = x.repeat_interleave(9, 2).repeat_interleave(9, 3) * 0 + x.sum((2, 3), keepdim=True).clamp(-4, 4)
    x[:, :, ::2] += 1
    x = x[:, :, :6, :6]  # bins of two rows, whose mean is a half
    wide, half = module.attention(x.float()), module.to(dtype).attention(x.to(dtype))
    assert ((wide > 0.05) & (wide < 0.95)).float().mean() > 0.5
    assert wide.std() > 0.1
    torch.testing.assert_close(half, wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_sums_do_not_overflow(dtype):
    h, weight = torch.full((1, 2, 64, 64), 3e4, dtype=dtype), torch.ones(1, 2, 3, 3, dtype=dtype)
    parts = (SF.pool(h), SF.kernel_conv(h[:, :1], weight[:, :1]), SF.normalize(h, (2, 3)))
    assert {part.dtype for part in parts} == {torch.float32}
    assert all(part.isfinite().all() for part in parts)
    s, c = normal(1, 1, 4, 4).to(dtype) * 8, normal(1, 3, 1, 1).to(dtype) * 8
    assert torch.equal(SF.attention(s, c), torch.sigmoid(s.float() * c.float()))
    x = normal(1, 3, 4, 4).to(dtype)
    assert torch.equal(SF.sparta(x, s, c), (F.relu(x) * torch.sigmoid(s.float() * c.float())).to(dtype))


def test_autocast():
    module, x = reference.scatter(Sparta(4)), normal(2, 4, 5, 6)
    y = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        wide, *all_gradients = gradients(module, x)
        narrow = module(x.bfloat16())
        double = copy.deepcopy(module).double()(x.double())
    assert (wide.dtype, narrow.dtype, double.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    assert {g.dtype for g in all_gradients} == {torch.float32}
    torch.testing.assert_close(wide, y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(narrow.float(), y, rtol=0.05, atol=0.05)
    assert torch.equal(double, copy.deepcopy(module).double()(x.double()))


def test_autocast_leaves_the_logit_alone():
    h, s, kernel = normal(2, 4, 5, 6), normal(2, 1, 5, 6), normal(2, 1, 3, 3)

    def parts():
        return SF.kernel_conv(s, kernel), SF.pool(h), SF.normalize(h, (2, 3))

    plain = parts()
    with torch.autocast("cpu", torch.bfloat16):
        cast = parts()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_channels_last_stays(arguments):
    module, x = reference.scatter(Sparta(4, **arguments)).double(), normal(2, 4, 5, 6).double()
    expected = gradients(module, x)
    found = gradients(module, x.contiguous(memory_format=torch.channels_last))
    for tensor in found[:2]:  # output and gradient of the input
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    for tensor in expected[:2]:
        assert tensor.is_contiguous()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_gradients_lie_in_memory_as_their_parameters(arguments, memory_format):
    """Or DDP copies them, and warns."""
    module = reference.scatter(Sparta(4, **arguments)).to(memory_format=memory_format)
    for x in (normal(2, 4, 5, 6), normal(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)):
        module.zero_grad()
        module(x).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name


class OtherStrides(nn.Module):
    """Its gradient has other strides than its weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 1, 3, 3)), nn.Parameter(torch.ones(1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return x.mean() * (self.weight.flatten(1) * torch.arange(9.0)) + self.bias


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no processes")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_data_parallel_does_not_warn(memory_format):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        told = []
        ours = Sparta(4), Sparta(4, dynamic=False, neighborhood=2)
        for module in (*(m.to(memory_format=memory_format) for m in ours), OtherStrides()):
            model = DistributedDataParallel(module)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(normal(2, 4, 5, 6).contiguous(memory_format=memory_format)).sum().backward()
            told.append(["strides" in str(warning.message) for warning in caught])
    finally:
        torch.set_warn_always(always)
        dist.destroy_process_group()
    assert told[:2] == [[], []]
    assert any(told[2])  # so a warning would have been seen


def test_gate_is_formed_in_the_layout_of_x():
    """Or every product with it walks through memory the wrong way."""
    x = normal(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    for scale in (1, 2):
        assert SF._gate_as(x, x[:, :1], normal(2, 4, 1, 1), scale).stride() == x.stride()


def test_any_strides():
    module, x = reference.scatter(Sparta(3)).double(), normal(2, 5, 12, 3).double()
    view = x.transpose(1, 3)[:, :, ::2, :]  # (2, 3, 6, 5), neither layout
    torch.testing.assert_close(gradients(module, view), gradients(module, view.contiguous()))


@pytest.mark.parametrize("size", [1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_very_large_inputs_stay_finite(dtype, size):
    module, x = reference.scatter(Sparta(4)).to(dtype), (normal(2, 4, 5, 6) * size).to(dtype)
    for tensor in gradients(module, x):
        assert tensor.isfinite().all()
    y = module(x)
    assert (y >= 0).all()
    assert (y <= F.relu(x)).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_what_is_not_finite_stays_in_its_sample(arguments, bad, memory_format):
    module, x = reference.scatter(Sparta(3, **arguments)), normal(3, 3, 5, 6)
    spoilt = x.clone()
    spoilt[1, 2, 3, 4] = bad
    results = []
    for z in (x, spoilt):
        z = z.contiguous(memory_format=memory_format).requires_grad_()
        y = module(z)
        results.append((y, module.attention(z), torch.autograd.grad(y.square().sum(), z)[0]))
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean[::2], other[::2])
        assert clean.isfinite().all()
    assert not results[1][0][1].isfinite().all()


def test_input_is_left_alone():
    module, x = reference.scatter(Sparta(4)), normal(2, 4, 5, 6)
    before = x.clone()
    gradients(module, x)
    module.attention(x)
    SwishReLU()(x)
    SwishReLU(inplace=True)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("strict", [False, True])
def test_twice_the_same(strict):
    module, x = reference.scatter(Sparta(4, neighborhood=2)), normal(3, 4, 7, 6)
    torch.use_deterministic_algorithms(strict)
    try:
        first, second = gradients(module, x), gradients(module, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_larger_batch_is_no_more_operations():
    """Some of torch's functions go sample by sample: on a GPU that is a launch for each."""

    def operations(n):
        module, x = reference.scatter(Sparta(3)), normal(n, 3, 5, 6).requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            module(x).sum().backward()
        return {e.key: e.count for e in profiler.key_averages() if e.key.startswith("aten::")}

    assert operations(3) == operations(7)


def test_no_number_is_a_tensor_of_the_cpu():
    """On a GPU such a tensor is waited for, and keeps a compiled network from being recorded."""
    module, x = reference.scatter(Sparta(3)), normal(2, 3, 5, 6)
    constants = []

    def look(graph, inputs):
        constants.extend(n.target for n in graph.graph.nodes if n.op == "get_attr" or "lift" in str(n.target))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, inference_compiler=look)
    torch.testing.assert_close(torch.compile(module, backend=backend)(x), module(x))
    assert not constants


# ---- what PyTorch does to modules


@pytest.mark.parametrize("arguments", [a for a in ARGUMENTS if "hidden" not in a], ids=str)
def test_compile_traces_one_whole_graph(arguments):
    torch._dynamo.reset()
    module = reference.scatter(Sparta(2, **arguments)).double()
    x = normal(2, 2, 3, 5).double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x), gradients(module, x), rtol=1e-11, atol=1e-13)


def test_compile_makes_one_graph_for_every_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = reference.scatter(Sparta(3)).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for shape in [(2, 3, 4, 5), (4, 3, 7, 6), (5, 3, 9, 8)]:
        x = normal(*shape).double()
        torch.testing.assert_close(gradients(compiled, x), gradients(module, x), rtol=1e-11, atol=1e-13)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow  # the C++ compiler takes its time
def test_compiled_code_is_the_eager_one():
    torch._dynamo.reset()
    module, x = reference.scatter(Sparta(3)).double(), normal(2, 3, 4, 5).double()
    x = x.contiguous(memory_format=torch.channels_last)
    found = gradients(torch.compile(module, fullgraph=True, dynamic=True), x)
    torch.testing.assert_close(found, gradients(module, x), rtol=1e-11, atol=1e-13)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


OTHERS = [(5, 3, 4, 5), (1, 3, 7, 3), (3, 3, 8, 9), (2, 3, 3, 3), (1, 3, 1, 6)]


def assert_the_same_for_others(other, module, shapes=OTHERS, **tolerances):
    dtype = next(module.parameters()).dtype
    for shape in shapes:
        x = normal(*shape, dtype=dtype)
        torch.testing.assert_close(other(x), module(x), **tolerances)


def dynamic_axes(*axes):
    names = {0: "batch", 2: "height", 3: "width"}
    return ({axis: torch.export.Dim(names[axis], min=1) for axis in axes},)


@pytest.mark.parametrize("arguments", [{}, {"identity": True, "dynamic": False}], ids=str)
def test_export_for_every_batch_height_and_width(arguments):
    module = reference.scatter(Sparta(3, **arguments)).double()
    shapes = dynamic_axes(0, 2, 3)
    exported = torch.export.export(module, (normal(2, 3, 4, 5).double(),), dynamic_shapes=shapes).module()
    assert_the_same_for_others(exported, module, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_export_with_neighbors_for_every_batch_and_all_larger_maps(n):
    """By `Dim.AUTO`: torch 2.13 fails on a named one where a size is rounded up, as does torch 2.4."""
    module = reference.scatter(Sparta(3, neighborhood=n)).double()
    if hasattr(torch.export.Dim, "AUTO"):
        shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
        sizes = [(5, 3, n + 1, 6), (1, 3, 9, 5), (3, 3, 8, 7), (2, 3, 12, n + 1)]
    else:
        shapes, sizes = dynamic_axes(0), [(5, 3, 6, 7), (1, 3, 6, 7)]
    exported = torch.export.export(module, (normal(2, 3, 6, 7).double(),), dynamic_shapes=shapes).module()
    assert_the_same_for_others(exported, module, sizes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("size", "spread"), [(1, 0.18), (0.3, 0.17), (0.1, 0.05), (0.01, 0.0)])
def test_the_gate_is_awake_but_where_all_of_x_is_small(size, spread):
    """The numbers of docs/activation.md."""
    torch.manual_seed(0)
    x = size * torch.randn(4, 64, 56, 56).relu()
    assert Sparta(64).attention(x)[x > 0].std().item() == pytest.approx(spread, abs=0.01)


def test_a_pass_on_fake_tensors_leaves_nothing_behind():
    module, x = Sparta(3), normal(1, 3, 11, 13)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(x)
    assert type(module(x)) is torch.Tensor


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*trace.* is deprecated")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_torchscripts_tracer_takes_no_size_for_a_constant(arguments):
    module = reference.scatter(Sparta(3, **arguments)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, normal(2, 3, 4, 5).double())
    assert_the_same_for_others(traced, module, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_symbolic_trace(arguments):
    module = reference.scatter(Sparta(3, **arguments)).double()
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), module).double())
    with torch.no_grad():
        getattr(graph, "0").weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        getattr(graph, "0").bias.zero_()
    assert {n.name for n in graph.graph.nodes if n.op == "call_function"} == {"_activate"}
    assert_the_same_for_others(graph, module, rtol=1e-12, atol=1e-14)
    alone = torch.fx.symbolic_trace(module)
    with pytest.raises(ShapeError, match=r"Sparta\(3\) was given \(2, 4, 5, 5\)"):
        alone(torch.zeros(2, 4, 5, 5))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
@pytest.mark.parametrize(
    ("arguments", "dynamo"), [({}, True), ({"identity": True, "neighborhood": 2}, False)], ids=str
)
def test_onnx_for_every_batch_height_and_width(arguments, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo and "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("this torch exports to ONNX by dynamo for one shape alone")
    module, x, file = reference.scatter(Sparta(3, **arguments)), normal(2, 3, 4, 5), tmp_path / "sparta.onnx"
    axes = dynamic_axes(0, 2, 3)
    if dynamo:
        torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=axes, verbose=False).save(file)
    else:
        names = {axis: dim.__name__ for axis, dim in axes[0].items()}
        torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": names})
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(file, options)

    def run(x):
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    assert_the_same_for_others(run, module, OTHERS[:4], rtol=1e-4, atol=1e-5)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_equal_and_apart(duplicate, arguments, frozen):
    module, x = reference.scatter(Sparta(3, **arguments)), normal(2, 3, 5, 4)
    module = module.freeze() if frozen else module
    twin = duplicate(module)
    assert type(twin) is Sparta
    assert repr(twin) == repr(module)
    assert twin.frozen == frozen
    assert [p.requires_grad for p in twin.parameters()] == [not frozen] * len(list(twin.parameters()))
    y = module(x)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.conv2[0].add_(1)
    assert torch.equal(module(x), y)
    assert not torch.equal(twin(x), y)


@pytest.mark.parametrize("dynamic", [True, False])
def test_state_dict_round_trip(dynamic):
    module, x = reference.scatter(Sparta(3, dynamic=dynamic)), normal(2, 3, 5, 4)
    names = {"conv1", "conv2", "conv3", "conv4", "conv6" if dynamic else "conv5", "gain"}
    assert set(module.state_dict()) == names
    other = Sparta(3, dynamic=dynamic)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match=r"conv[56]"):
        Sparta(3, dynamic=not dynamic).load_state_dict(module.state_dict(), strict=True)


def test_vmap():
    modules = [reference.scatter(Sparta(3), seed).double() for seed in range(3)]
    x, first = normal(4, 3, 5, 6).double(), modules[0]
    torch.testing.assert_close(vmap(lambda sample: first(sample[None])[0])(x), first(x))

    parameters, buffers = stack_module_state(modules)  # an ensemble on one batch
    found = vmap(lambda p, b: functional_call(first, (p, b), x))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([m(x) for m in modules]))

    def loss(p, sample):  # gradients of every sample
        return functional_call(first, p, sample[None]).square().sum()

    p = dict(first.named_parameters())
    found = vmap(grad(loss), in_dims=(None, 0))(p, x)
    for name in p:
        slow = torch.stack([torch.autograd.grad(loss(p, sample), p[name])[0] for sample in x])
        torch.testing.assert_close(found[name], slow)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_several_gradients_at_once(arguments):
    module, x = reference.scatter(Sparta(3, **arguments), 0).double(), normal(2, 3, 5, 6).double()
    one_by_one, at_once = (
        torch.autograd.functional.jacobian(module, x, vectorize=vectorize) for vectorize in (False, True)
    )
    torch.testing.assert_close(at_once, one_by_one)


def test_checkpoints_that_keep_the_convolutions():
    def keep(context, operator, *args, **kwargs):
        convolution = operator == torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE

    module, x = reference.scatter(Sparta(3), 0), normal(2, 3, 5, 6)
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    found = gradients(module, x)
    kept = gradients(Kept(module, contexts), x)
    torch.testing.assert_close(kept, found)


class Kept(nn.Module):
    def __init__(self, module, contexts):
        super().__init__()
        self.module, self.contexts = module, contexts

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False, context_fn=self.contexts)


def test_compiled_transforms():
    module, x = reference.scatter(Sparta(3), 0).double(), normal(4, 3, 5, 6).double()

    def loss(sample):
        return module(sample[None]).square().sum()

    for transformed in (vmap(lambda sample: module(sample[None])[0]), vmap(grad(loss))):
        torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(x), transformed(x))


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None)])
def test_vmap_over_some_of_the_gates_inputs(batched):
    given = (normal(2, 3, 5, 6).double(), normal(2, 1, 5, 6).double(), normal(2, 3, 1, 1).double())
    stacked = [t if b is None else torch.stack([t, t]) for t, b in zip(given, batched, strict=True)]
    torch.testing.assert_close(vmap(SF.sparta, batched)(*stacked)[1], SF.sparta(*given))


def test_a_closed_gate_and_minus_infinity_make_zero():
    x, s, c = torch.full((1, 1, 1, 1), -torch.inf), torch.full((1, 1, 1, 1), -800.0), torch.ones(1, 1, 1, 1)
    assert SF.sparta(x, s, c).item() == 0


@pytest.mark.parametrize("identity", [False, True])
def test_moves(identity):
    module = Sparta(3, identity=identity)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        tensors = [*module.to(dtype).parameters(), *module.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    with torch.device("meta"):
        empty = Sparta(3, identity=identity)
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu").reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())
    assert empty.gain == (0 if identity else 1)
    for name, weight in empty.named_parameters():
        if name != "gain":  # as PyTorch draws a convolution's
            bound = weight[0].numel() ** -0.5
            assert 0.5 * bound < weight.abs().max() <= bound, name


# ---- frozen


def train_step(module, x):
    """One step of everything that could move a parameter."""
    weight = nn.Parameter(torch.ones(3, 1, 1))
    optimizer = torch.optim.SGD([weight, *module.parameters()], lr=0.1, momentum=0.9, weight_decay=0.1)
    (module(x * weight).square().sum()).backward()
    optimizer.step()


def test_frozen_does_not_move():
    module, x = reference.scatter(Sparta(3)), normal(4, 3, 5, 6)
    assert module.freeze() is module
    assert module.extra_repr().startswith("3, hidden=8, frozen; conv1 8x3x3x3, ")
    model = nn.Sequential(nn.Conv2d(3, 3, 1), module)
    model.train()
    assert model.training
    assert not any(m.training for m in module.modules())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    y = module(x)
    train_step(module, x)
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(module(x), y)
    x = x.requires_grad_()
    frozen, free = (torch.autograd.grad(m(x).sum(), x)[0] for m in (module, copy.deepcopy(module).unfreeze()))
    torch.testing.assert_close(frozen, free)  # what an attack needs
    assert frozen.abs().max() > 0


def test_frozen_stays_though_all_parameters_are_told_to_learn():
    module, x = reference.scatter(Sparta(3)).freeze(), normal(4, 3, 5, 6)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), module)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    net.train().requires_grad_(True)  # as those do who train a whole network
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert net[0].weight.grad.abs().max() > 0
    module.unfreeze()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_frozen_between_a_backward_and_a_step_does_not_move(make):
    module, x = reference.scatter(Sparta(3)), normal(4, 3, 5, 6)
    optimizer = make(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        module(x).square().sum().backward()
        optimizer.step()  # there is momentum now, and there are gradients
    before = {k: v.clone() for k, v in module.freeze().state_dict().items()}
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_unfrozen_learns_again():
    module, x = reference.scatter(Sparta(3)), normal(4, 3, 5, 6)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert module.freeze().unfreeze() is module
    assert module.extra_repr().startswith("3, hidden=8; conv1 8x3x3x3, ")
    assert all(m.training for m in module.modules())
    train_step(module, x)
    assert not any(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not module.eval().training
    assert module.train().training


# ---- errors


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (3, 5, 6), (2, 3, 5), (3,), (1, 2, 3, 4, 5)])
def test_wrong_input_is_refused(shape):
    text = f"Sparta(3) was given {shape}; it takes (N, 3, H, W)"
    for call in (Sparta(3), Sparta(3).attention, Sparta(3).scores):
        with pytest.raises(ShapeError) as error:
            call(torch.zeros(shape))
        assert str(error.value) == text
    assert issubclass(ShapeError, SpartaError)
    assert issubclass(SpartaError, ValueError)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_impossible_arguments_are_refused(value):
    c = {"in_channels": 3}
    for name, arguments in [
        ("in_channels", {}),
        ("neighborhood", c),
        *([] if value is None else [("hidden", c)]),
    ]:
        with pytest.raises(ShapeError) as error:
            Sparta(**arguments, **{name: value})
        text = f"Sparta: {name} must be a whole number of at least 1, not {value!r}"
        assert str(error.value) == text


def test_repr_shows_the_arguments_and_the_shapes():
    assert repr(Sparta(16)) == (
        "Sparta(16, hidden=8; conv1 8x16x3x3, conv2 16x8x3x3, conv3 8x16x3x3, conv4 1x8x3x3, "
        "conv6 1x16x3x3, gain 1)"
    )
    assert repr(Sparta(4, hidden=2, identity=True, dynamic=False, neighborhood=4).freeze()) == (
        "Sparta(4, hidden=2, identity=True, dynamic=False, neighborhood=4, frozen; conv1 2x4x3x3, "
        "conv2 4x2x3x3, conv3 2x4x3x3, conv4 1x2x3x3, conv5 1x1x3x3, gain 1)"
    )


def test_meta_tensors_go_through():
    module = Sparta(4).to("meta")
    assert module(torch.empty(2, 4, 6, 5, device="meta")).shape == (2, 4, 6, 5)


def test_a_reset_leaves_a_frozen_module_alone():
    module = Sparta(4).freeze()
    before = module.conv1.clone()
    module.reset_parameters()
    assert torch.equal(module.conv1, before)
    module.unfreeze().reset_parameters()
    assert not torch.equal(module.conv1, before)


@pytest.mark.parametrize("name", ["dynamic", "identity"])
@pytest.mark.parametrize("value", ["False", "yes", 0, 1, None])
def test_a_switch_is_a_bool(name, value):
    with pytest.raises(ShapeError, match=f"Sparta: {name} must be True or False, not {value!r}"):
        Sparta(4, **{name: value})


def test_maps_are_not_empty():
    with pytest.raises(ShapeError, match=r"was given \(1, 4, 0, 3\)"):
        Sparta(4)(torch.rand(1, 4, 0, 3))
