"""The comparisons that are no readings of SPARTA: Dynamic ReLU and feature denoising."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparta_act import baselines
from sparta_act.baselines import DynamicReLUA, DynamicReLUB, DynamicReLUC, FeatureDenoising
from sparta_act.errors import ShapeError

TWINS = {
    DynamicReLUA: reference.dynamic_relu_a,
    DynamicReLUB: reference.dynamic_relu_b,
    DynamicReLUC: reference.dynamic_relu_c,
    FeatureDenoising: reference.feature_denoising,
}
DYNAMIC = [DynamicReLUA, DynamicReLUB, DynamicReLUC]
SHAPES = [(2, 4, 4, 4), (1, 8, 1, 1), (4, 4, 3, 1), (1, 9, 2, 5), (2, 1, 2, 3), (2, 16, 3, 2)]


def normal(*shape, seed=1, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def scattered(module, channels):
    net = reference.scatter(module(channels))
    if module in DYNAMIC:
        net.squeeze.bias.data[0].abs_().add_(1)  # one way through the ReLU of the hyper-network is open
    return net


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module", TWINS)
def test_fast_form_is_the_twin(module, shape):
    net = scattered(module, shape[1]).double().eval()
    reference.assert_same(net, TWINS[module], normal(*shape, dtype=torch.float64))
    if module in DYNAMIC:  # pi reaches its 1
        reference.assert_same(net, TWINS[module], 50 * normal(*shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 2, 1, 2)])
def test_denoising_uses_the_batch_in_training(shape):
    module = reference.scatter(FeatureDenoising(shape[1])).double().train()

    def twin(x, p):
        return reference.feature_denoising(x, p, training=True)

    reference.assert_same(module, twin, normal(*shape, dtype=torch.float64))


@pytest.mark.parametrize("module", TWINS)
def test_gradcheck(module):
    net = scattered(module, 4).double().eval()
    names, values = zip(*net.named_parameters(), strict=True)

    def call(x, *values):
        return functional_call(net, dict(zip(names, values, strict=True)), x)

    inputs = (normal(2, 4, 3, 2, dtype=torch.float64).requires_grad_(), *values)
    assert gradcheck(call, inputs, fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of feature denoising's attention have no second
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_denoising_never_holds_all_pairs_of_positions(memory_format):
    x = normal(1, 4, 32, 32).contiguous(memory_format=memory_format).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        FeatureDenoising(4)(x)
    assert max(kept) < (32 * 32) ** 2 / 8


@pytest.mark.parametrize("module", DYNAMIC)
def test_dynamic_relu_without_residual_is_relu(module):
    net, x = module(8), normal(2, 8, 5, 4)
    x[:, ::2] = 0  # the kink
    for layer in (net.excite, *net.children()):
        for p in layer.parameters():
            nn.init.zeros_(p)
    share = 1 / 3 if module is DynamicReLUC else 1  # a uniform pi is gamma / (H W)
    torch.testing.assert_close(net(x), share * F.relu(x))


@pytest.mark.parametrize("module", DYNAMIC)
def test_dynamic_relu_shapes(module):
    lines = 4 if module is DynamicReLUA else 4 * 8
    shapes = {name: tuple(p.shape) for name, p in module(8).named_parameters()}
    expected = {"squeeze.weight": (2, 8), "squeeze.bias": (2,)}
    expected |= {"excite.weight": (lines, 2), "excite.bias": (lines,)}
    expected |= {"position.weight": (1, 8, 1, 1)} if module is DynamicReLUC else {}
    assert shapes == expected


def test_residuals_are_bounded():
    x = torch.tensor([[[[1.0, -1.0]]]])
    top, bottom = torch.ones(4, 1, 1, 1, 1), -torch.ones(4, 1, 1, 1, 1)
    assert baselines.dynamic_relu(x, top).flatten().tolist() == [2.5, -0.5]
    assert baselines.dynamic_relu(x, bottom).flatten().tolist() == [-0.5, 0.5]


def test_spatial_attention_is_a_bounded_share():
    z = normal(3, 1, 5, 7) * 100
    pi = baselines.spatial_attention(z)
    assert pi.max() == 1
    assert (pi > 0).all()
    assert (baselines.spatial_attention(z / 1e3).sum((1, 2, 3)) - 35 / 3).abs().max() < 1e-4


def test_denoising_starts_as_the_identity():
    x = normal(2, 6, 5, 4)
    for net in (FeatureDenoising(6).train(), FeatureDenoising(6).eval()):
        assert torch.equal(net(x), x)
        assert torch.autograd.grad(net(x).square().sum(), net.norm.weight)[0].abs().max() > 0


def test_denoising_removes_what_differs_from_its_like():
    """On a constant map the mean is the map; with great theta and phi only one's like counts."""
    x = normal(1, 2, 1, 1).expand(1, 2, 3, 4).contiguous()
    torch.testing.assert_close(baselines.nonlocal_mean(x, normal(1, 3, 3, 4), normal(1, 3, 3, 4)), x)
    x, like = normal(1, 2, 2, 2), torch.eye(4).view(1, 4, 2, 2) * 20
    torch.testing.assert_close(baselines.nonlocal_mean(x, like, like), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", TWINS)
def test_every_dtype_comes_back(module, dtype):
    wide, x = scattered(module, 4), normal(2, 4, 5, 6)
    narrow, z = copy.deepcopy(wide).to(dtype), x.to(dtype).requires_grad_()
    y = narrow(z)
    y.sum().backward()
    assert {t.dtype for t in (y, z.grad, *(p.grad for p in narrow.parameters()))} == {dtype}
    torch.testing.assert_close(y.float(), wide(x), rtol=0.05, atol=0.05)


def test_half_precision_share_keeps_its_digits():
    z = normal(1, 1, 56, 56).half()
    torch.testing.assert_close(baselines.spatial_attention(z), baselines.spatial_attention(z.float()))


@pytest.mark.parametrize("module", TWINS)
def test_autocast(module):
    net, x = scattered(module, 4).eval(), normal(2, 4, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = net(x), net(x.bfloat16())
        double = copy.deepcopy(net).double()(x.double())
    assert (wide.dtype, narrow.dtype, double.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    torch.testing.assert_close(wide, net(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(narrow.float(), net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("module", TWINS)
def test_channels_last_stays(module):
    net, x = scattered(module, 4).double().eval(), normal(2, 4, 5, 6).double()
    y = net(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert net(x).is_contiguous()
    torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize("module", TWINS)
def test_samples_do_not_see_each_other(module):
    net, x = scattered(module, 4).double().eval(), normal(4, 4, 5, 6).double()
    alone = torch.cat([net(sample[None]) for sample in x])
    torch.testing.assert_close(net(x), alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vmap(lambda sample: net(sample[None])[0])(x), alone)


@pytest.mark.parametrize("module", TWINS)
def test_state_dict_round_trip(module):
    net, x = scattered(module, 4).eval(), normal(2, 4, 5, 6)
    other = module(4).eval()
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("module", TWINS)
def test_compile_traces_one_whole_graph(module):
    torch._dynamo.reset()
    net, x = scattered(module, 4).double().eval(), normal(2, 4, 3, 5).double()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("module", TWINS)
def test_errors(module):
    for shape in [(2, 3, 5, 6), (4, 5, 6), (4,)]:
        with pytest.raises(ShapeError) as error:
            module(4)(torch.zeros(shape))
        assert str(error.value) == f"{module.__name__}(4) was given {shape}; it takes (N, 4, H, W)"
    for value in (0, 1.5, True, None):
        with pytest.raises(ShapeError) as error:
            module(value)
        text = f"{module.__name__}: in_channels must be a whole number of at least 1, not {value!r}"
        assert str(error.value) == text
