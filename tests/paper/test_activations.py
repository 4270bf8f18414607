"""Rivals of SPARTA: each against its slow reference, and where the result is known."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.paper.common import activations
from examples.paper.common.activations import (
    AsRead,
    DynamicReLUB,
    DynamicReLUC,
    FeatureDenoising,
    Normed,
    Pooled,
    PooledNormed,
)
from tests.helpers import reference

READINGS = {
    AsRead: reference.as_read,
    Pooled: reference.pooled,
    Normed: reference.as_read,
    PooledNormed: reference.pooled,
}
DYNAMIC = {
    DynamicReLUB: reference.dynamic_relu_b,
    DynamicReLUC: reference.dynamic_relu_c,
}
OTHERS = DYNAMIC | {FeatureDenoising: reference.feature_denoising}
SHAPES = [(2, 4, 4, 4), (1, 8, 1, 1), (1, 9, 2, 5)]


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scattered(module, channels):
    net = reference.scatter(module(channels)).double()
    if module in DYNAMIC:
        net.squeeze.bias.data[0].abs_().add_(1)  # one unit of the hyper-network's ReLU is active
    return net


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module", READINGS | OTHERS)
def test_the_fast_form_is_the_reference(module, shape):
    net, slow = scattered(module, shape[1]).eval(), (READINGS | OTHERS)[module]
    reference.assert_same(net, slow, normal(*shape))
    if module in DYNAMIC:
        reference.assert_same(net, slow, 50 * normal(*shape))  # pi reaches its 1


@pytest.mark.parametrize("module", READINGS)
def test_a_reading_with_a_learned_kernel_is_the_reference(module):
    net, slow = scattered(partial(module, dynamic=False), 4).eval(), READINGS[module]
    reference.assert_same(net, partial(slow, dynamic=False), normal(2, 4, 4, 4))


@pytest.mark.parametrize("module", [Normed, PooledNormed, FeatureDenoising])
def test_norms_use_the_batch_in_training(module):
    net, slow = scattered(module, 3).train(), (READINGS | OTHERS)[module]
    reference.assert_same(net, partial(slow, training=True), normal(3, 3, 2, 4))


@pytest.mark.parametrize("module", OTHERS)
def test_gradcheck(module):
    net = scattered(module, 4).eval()
    names, values = zip(*net.named_parameters(), strict=True)

    def call(x, *values):
        return functional_call(net, dict(zip(names, values, strict=True)), x)

    inputs = (normal(2, 4, 3, 2).requires_grad_(), *values)
    assert gradcheck(call, inputs, fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("module", READINGS)
def test_a_fresh_reading_halves_relu(module, dynamic):
    x = normal(2, 8, 5, 4).float()
    assert torch.equal(module(8, dynamic=dynamic)(x), 0.5 * F.relu(x))


@pytest.mark.parametrize("module", DYNAMIC)
def test_dynamic_relu_without_residual_is_relu(module):
    net, x = module(8).double(), normal(2, 8, 5, 4)
    x[:, ::2] = 0  # the kink
    for p in (p for layer in net.children() for p in layer.parameters()):
        nn.init.zeros_(p)
    share = 1 / 3 if module is DynamicReLUC else 1  # a uniform pi is gamma / (H W)
    torch.testing.assert_close(net(x), share * F.relu(x))


def test_residuals_are_bounded():
    x = torch.tensor([[[[1.0, -1.0]]]])
    top, bottom = torch.ones(4, 1, 1, 1, 1), -torch.ones(4, 1, 1, 1, 1)
    assert activations.dynamic_relu(x, top).flatten().tolist() == [2.5, -0.5]
    assert activations.dynamic_relu(x, bottom).flatten().tolist() == [-0.5, 0.5]


def test_spatial_attention_is_a_bounded_share():
    z = 100 * normal(3, 1, 5, 7)
    pi = activations.spatial_attention(z)
    assert pi.max() == 1
    assert (pi > 0).all()
    assert (activations.spatial_attention(z / 1e3).sum((1, 2, 3)) - 35 / 3).abs().max() < 1e-4


def test_denoising_starts_as_the_identity():
    x = normal(2, 6, 5, 4)
    for net in (FeatureDenoising(6).double().train(), FeatureDenoising(6).double().eval()):
        assert torch.equal(net(x), x)
        assert torch.autograd.grad(net(x).square().sum(), net.norm.weight)[0].abs().max() > 0


def test_the_nonlocal_mean_of_similar_positions_is_their_value():
    """On a constant map the mean is the map; with large theta and phi each position sees only itself."""
    x = normal(1, 2, 1, 1).expand(1, 2, 3, 4).contiguous()
    torch.testing.assert_close(activations.nonlocal_mean(x, normal(1, 3, 3, 4), normal(1, 3, 3, 4)), x)
    x, own = normal(1, 2, 2, 2), torch.eye(4, dtype=x.dtype).view(1, 4, 2, 2) * 20
    torch.testing.assert_close(activations.nonlocal_mean(x, own, own), x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_denoising_never_stores_all_pairs_of_positions(memory_format):
    x = normal(1, 4, 32, 32).float().contiguous(memory_format=memory_format).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        FeatureDenoising(4)(x)
    assert max(saved) < (32 * 32) ** 2 / 8


@pytest.mark.parametrize("module", READINGS | OTHERS)
def test_a_mixed_precision_training_in_channels_last_computes_the_same(module):
    net, x = scattered(module, 4).float().eval(), normal(2, 4, 5, 6).float()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(last), net(x))
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = net(last), net(last.bfloat16())
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    for y in (wide, narrow.float()):
        torch.testing.assert_close(y, net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", READINGS | OTHERS)
def test_no_images_stay_none(module, training):
    x = torch.rand(0, 6, 4, 3, requires_grad=True)
    y = module(6).train(training)(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
