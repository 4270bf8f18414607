"""The activations, fast form against slow twin, and everything PyTorch may do to a module."""

import copy
import io

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap

from sparta_act import functional as SF
from sparta_act.activations import Sparta, SwishReLU
from sparta_act.baselines import NormedSparta, PooledNormedSparta, PooledSparta
from sparta_act.errors import ShapeError, SpartaError

READINGS = [Sparta, PooledSparta, NormedSparta, PooledNormedSparta]
NORMED = [NormedSparta, PooledNormedSparta]
TWINS = {
    Sparta: reference.sparta,
    PooledSparta: reference.pooled_sparta,
    NormedSparta: reference.sparta,
    PooledNormedSparta: reference.pooled_sparta,
}
SHAPES = [(2, 3, 3, 3), (1, 2, 1, 1), (3, 2, 5, 3), (1, 3, 2, 7), (2, 2, 7, 2), (2, 1, 4, 4), (1, 4, 1, 6)]
HALVES = [torch.float16, torch.bfloat16]


def normal(*shape, seed=1, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def off_the_kink(*shape):
    x = normal(*shape, dtype=torch.float64)
    return (x + 0.1 * x.sign()).requires_grad_()


def gradients(module, x):
    """Output and gradients of a weighted sum of it: input first, then the parameters that learn."""
    x = x.clone().requires_grad_()
    y = module(x)
    v = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return [y, *torch.autograd.grad((y * v).sum(), [x, *(p for p in module.parameters() if p.requires_grad)])]


# ---- the formulas


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("reading", READINGS)
def test_fast_form_is_the_twin(reading, dynamic, shape):
    module = reference.scatter(reading(shape[1], dynamic=dynamic)).double().eval()
    reference.assert_same(module, TWINS[reading], normal(*shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 2, 5, 7), (2, 2, 1, 3), (1, 1, 8, 6)])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("reading", [Sparta, PooledSparta])
def test_neighbors_share_a_score(reading, n, shape):
    module = reference.scatter(reading(shape[1], neighborhood=n)).double()
    x = normal(*shape, dtype=torch.float64)
    reference.assert_same(module, lambda x, p: TWINS[reading](x, p, n), x)
    gate = module.attention(x)
    for i in range(shape[2]):
        for j in range(shape[3]):
            assert torch.equal(gate[:, :, i, j], gate[:, :, i // n * n, j // n * n])


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (3, 2, 5, 3), (2, 2, 2, 7)])
@pytest.mark.parametrize("reading", NORMED)
def test_norms_use_the_batch_in_training(reading, shape):
    module = reference.scatter(reading(shape[1])).double().train()
    x = normal(*shape, dtype=torch.float64)
    reference.assert_same(module, lambda x, p: TWINS[reading](x, p, training=True), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_identity_is_the_long_way(shape):
    x, c = normal(*shape, dtype=torch.float64), shape[1]
    weight, kernel = (normal(*s, seed=2, dtype=torch.float64) for s in [(c, c, 3, 3), (shape[0], 1, 3, 3)])
    s, scale = x[:, :1], normal(shape[0], c, 1, 1, seed=3, dtype=torch.float64)
    conv, gate = reference.conv, reference.sigmoid(s * scale)
    own = torch.cat([conv(s[n : n + 1], kernel[n : n + 1]) for n in range(len(x))])
    for fast, slow in [
        (SF.relu_mean_conv(x, weight), conv(reference.relu(x), weight).mean((2, 3), keepdim=True)),
        (SF.full_conv(SF.pool(x), weight), conv(reference.pool(x), weight, padding=0)),
        (SF.conv_to_one(x, weight[:1]), conv(x, weight[:1])),
        (SF.pool(x), reference.pool(x)),
        (SF.predict_kernel(x, weight), reference.phi_d(x, {"conv6": weight})[:, None]),
        (SF.kernel_conv(s, kernel), own),
        (SF.kernel_conv(s, kernel[:1]), conv(s, kernel[:1])),
        (SF.attention(s, scale), gate),
        (SF.sparta(x, s, scale), reference.relu(x) * gate),
        (SF.swish_relu(x), reference.swish_relu(x)),
    ]:
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reading", READINGS)
def test_gate_starts_at_half(reading):
    module, x = reading(5).eval(), normal(2, 5, 4, 3)
    assert torch.equal(module.attention(x), torch.full_like(x, 0.5))
    assert torch.equal(module(x), F.relu(x) / 2)
    x = x.requires_grad_()
    assert torch.autograd.grad(module(x).sum(), module.conv2)[0].abs().max() > 0  # and can leave it


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_output_is_relu_times_attention(reading, dtype):
    module = reference.scatter(reading(4)).eval().to(dtype)
    x = normal(2, 4, 5, 3, dtype=dtype)
    gate = module.attention(x)
    assert gate.dtype == torch.promote_types(dtype, torch.float32)
    assert gate.min() >= 0
    assert gate.max() <= 1
    assert gate.std() > 0.05
    assert torch.equal(module(x), (F.relu(x) * gate).to(dtype))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 2, 5, 7), (2, 4, 8, 6)])
@pytest.mark.parametrize("reading", READINGS)
def test_the_scores_are_the_gates_logit(reading, shape, n):
    module, x = reference.scatter(reading(shape[1], neighborhood=n)).eval(), normal(*shape)
    s, c = module.scores(x)
    assert s.shape == (shape[0], 1, *shape[2:])
    assert c.shape == (*shape[:2], 1, 1)
    assert torch.equal(module.attention(x), torch.sigmoid(s * c))
    assert torch.equal(module(x), F.relu(x) * torch.sigmoid(s * c))
    if n > 1:  # both see X averaged, and neighbours share a score
        alone = reading(shape[1]).eval()
        alone.load_state_dict(module.state_dict())
        small, channel = alone.scores(F.avg_pool2d(x, n, ceil_mode=True))
        assert torch.equal(c, channel)
        for i in range(shape[2]):
            for j in range(shape[3]):
                assert torch.equal(s[:, :, i, j], small[:, :, i // n, j // n])


@pytest.mark.parametrize("reading", READINGS)
def test_the_scores_are_phi_s_and_phi_c(reading):
    module, x = reference.scatter(reading(3)).double().eval(), normal(2, 3, 4, 5, dtype=torch.float64)
    p, pooled = module.state_dict(), issubclass(reading, PooledSparta)
    kernels = (reference.pooled_phi_d if pooled else reference.phi_d)(x, p)
    s, c = module.scores(x)
    torch.testing.assert_close(s, reference.phi_s(x, p, kernels, False))
    torch.testing.assert_close(c, (reference.pooled_phi_c if pooled else reference.phi_c)(x, p, False))


@pytest.mark.parametrize("reading", READINGS)
def test_the_scores_pass_gradients_on(reading):
    module, x = reference.scatter(reading(3)).eval(), normal(2, 3, 4, 5).requires_grad_()
    for score in module.scores(x):
        assert torch.autograd.grad(score.square().sum(), x, retain_graph=True)[0].abs().max() > 0


@pytest.mark.parametrize("reading", [Sparta, PooledSparta])
@pytest.mark.parametrize("c", [1, 5])
def test_parameters_have_the_papers_shapes(reading, c):
    assert sum(p.numel() for p in reading(c).parameters()) == 36 * c**2 + 9 * c
    shapes = {name: tuple(p.shape) for name, p in reading(c, dynamic=False).named_parameters()}
    square = (c, c, 3, 3)
    one = {"conv4": (1, c, 3, 3), "conv5": (1, 1, 3, 3)}
    assert shapes == {"conv1": square, "conv2": square, "conv3": square} | one


# ---- derivatives


def test_gradcheck_of_the_gate():
    inputs = off_the_kink(2, 3, 3, 3), off_the_kink(2, 1, 3, 3), off_the_kink(2, 3, 1, 1)
    assert gradcheck(SF.sparta, inputs)
    assert gradgradcheck(SF.sparta, inputs)
    assert gradcheck(SF.swish_relu, inputs[:1])
    assert gradgradcheck(SF.swish_relu, inputs[:1])


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (1, 2, 1, 4)])
@pytest.mark.parametrize("reading", READINGS)
def test_gradcheck_of_the_module(reading, shape):
    module = reference.scatter(reading(2)).double().eval()
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


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_do_not_depend_on_who_else_asks(reading):
    module, x = reference.scatter(reading(3)).double().eval(), normal(2, 3, 4, 5, dtype=torch.float64)
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
@pytest.mark.parametrize("reading", READINGS)
def test_every_dtype_comes_back(reading, dtype, n):
    wide, x = reference.scatter(reading(4, neighborhood=n)).train(), normal(2, 4, 5, 6)
    narrow = copy.deepcopy(wide).to(dtype)
    y, *all_gradients = gradients(narrow, x.to(dtype))
    assert {t.dtype for t in (y, *all_gradients)} == {dtype}
    torch.testing.assert_close(y.float(), wide(x), rtol=0.1, atol=0.1)
    assert all(g.isfinite().all() for g in all_gradients)
    assert torch.equal(SwishReLU()(x.to(dtype)), F.relu(x.to(dtype)) * torch.sigmoid(x.to(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_logit_is_formed_in_float32(dtype):
    module, x = Sparta(4), torch.randint(-2, 3, (2, 4, 5, 7), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():  # small whole numbers: the half precision convolutions are exact, the rest is not
        for weight in module.parameters():
            weight.copy_(torch.randint(-1, 2, weight.shape))
        module.conv2.div_(64)  # gates of all sizes
    wide, half = module.attention(x.float()), module.to(dtype).attention(x.to(dtype))
    assert ((wide > 0.05) & (wide < 0.95)).float().mean() > 0.5
    torch.testing.assert_close(half, wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_sums_do_not_overflow(dtype):
    h, weight = torch.full((1, 2, 64, 64), 30.0, dtype=dtype), torch.ones(1, 2, 3, 3, dtype=dtype)
    torch.testing.assert_close(SF.relu_mean_conv(h, weight), SF.relu_mean_conv(h.float(), weight.float()))
    parts = (
        SF.conv_to_one(h, weight),
        SF.predict_kernel(h, weight),
        SF.pool(h),
        SF.kernel_conv(h[:, :1], weight[:, :1]),
    )
    assert {part.dtype for part in parts} == {torch.float32}
    s, c = normal(1, 1, 4, 4).to(dtype) * 8, normal(1, 3, 1, 1).to(dtype) * 8
    assert torch.equal(SF.attention(s, c), torch.sigmoid(s.float() * c.float()))
    x = normal(1, 3, 4, 4).to(dtype)
    assert torch.equal(SF.sparta(x, s, c), (F.relu(x) * torch.sigmoid(s.float() * c.float())).to(dtype))


@pytest.mark.parametrize("reading", READINGS)
def test_autocast(reading):
    module, x = reference.scatter(reading(4)).eval(), normal(2, 4, 5, 6)
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
    h, s = normal(2, 4, 5, 6), normal(2, 1, 5, 6)
    weight, kernel = normal(4, 4, 3, 3), normal(2, 1, 3, 3)
    plain = SF.relu_mean_conv(h, weight), SF.kernel_conv(s, kernel), SF.pool(h)
    with torch.autocast("cpu", torch.bfloat16):
        cast = SF.relu_mean_conv(h, weight), SF.kernel_conv(s, kernel), SF.pool(h)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("reading", READINGS)
def test_channels_last_stays(reading, n):
    module, x = reference.scatter(reading(4, neighborhood=n)).double().eval(), normal(2, 4, 5, 6).double()
    expected = gradients(module, x)
    found = gradients(module, x.contiguous(memory_format=torch.channels_last))
    for tensor in found[:2]:  # output and gradient of the input
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    for tensor in expected[:2]:
        assert tensor.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_gate_is_formed_in_the_layout_of_x():
    """Or every product with it walks through memory the wrong way."""
    x = normal(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert SF._gate_as(x, x[:, :1], normal(2, 4, 1, 1)).stride() == x.stride()


@pytest.mark.parametrize("reading", READINGS)
def test_any_strides(reading):
    module, x = reference.scatter(reading(3)).double().eval(), normal(2, 5, 12, 3).double()
    view = x.transpose(1, 3)[:, :, ::2, :]  # (2, 3, 6, 5), neither layout
    torch.testing.assert_close(gradients(module, view), gradients(module, view.contiguous()))


@pytest.mark.parametrize("size", [1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reading", READINGS)
def test_very_large_inputs_stay_finite(reading, dtype, size):
    module, x = reference.scatter(reading(4)).eval().to(dtype), (normal(2, 4, 5, 6) * size).to(dtype)
    for tensor in gradients(module, x):
        assert tensor.isfinite().all()
    y = module(x)
    assert (y >= 0).all()
    assert (y <= F.relu(x)).all()


@pytest.mark.parametrize("reading", READINGS)
def test_zero_gives_zero(reading):
    x = torch.zeros(2, 4, 5, 6)
    y, *all_gradients = gradients(reference.scatter(reading(4)).eval(), x)
    assert torch.equal(y, x)
    assert all(g.isfinite().all() for g in all_gradients)


@pytest.mark.parametrize("reading", READINGS)
def test_input_is_left_alone(reading):
    module, x = reference.scatter(reading(4)), normal(2, 4, 5, 6)
    before = x.clone()
    gradients(module, x)
    module.attention(x)
    SwishReLU()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reading", READINGS)
def test_twice_the_same(reading, strict):
    module, x = reference.scatter(reading(4, neighborhood=2)).eval(), normal(3, 4, 7, 6)
    torch.use_deterministic_algorithms(strict)
    try:
        first, second = gradients(module, x), gradients(module, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("reading", READINGS)
def test_samples_do_not_see_each_other(reading, dynamic):
    module, x = reference.scatter(reading(3, dynamic=dynamic)).double().eval(), normal(4, 3, 5, 6).double()
    alone = torch.cat([module(sample[None]) for sample in x])
    torch.testing.assert_close(module(x), alone, rtol=1e-12, atol=1e-14)
    other = x.clone()
    other[1:] = normal(3, 3, 5, 6, seed=9)
    torch.testing.assert_close(module(other)[0], alone[0], rtol=1e-12, atol=1e-14)
    assert module(x[:0]).shape == (0, 3, 5, 6)


@pytest.mark.parametrize("reading", READINGS)
def test_a_larger_batch_is_no_more_operations(reading):
    """Some of torch's functions go sample by sample: on a GPU that is a launch for each."""

    def operations(n):
        module, x = reference.scatter(reading(3)), normal(n, 3, 5, 6).requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            module(x).sum().backward()
        return {e.key: e.count for e in profiler.key_averages() if e.key.startswith("aten::")}

    assert operations(3) == operations(7)


@pytest.mark.parametrize("reading", READINGS)
def test_no_number_is_a_tensor_of_the_cpu(reading):
    """On a GPU such a tensor is waited for, and keeps a compiled network from being recorded."""
    module, x = reference.scatter(reading(3)).eval(), normal(2, 3, 5, 6)
    constants = []

    def look(graph, inputs):
        constants.extend(n.target for n in graph.graph.nodes if n.op == "get_attr" or "lift" in str(n.target))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, inference_compiler=look)
    torch.testing.assert_close(torch.compile(module, backend=backend)(x), module(x))
    assert not constants


# ---- what PyTorch does to modules


@pytest.mark.parametrize(("reading", "dynamic"), [(r, True) for r in READINGS] + [(Sparta, False)])
def test_compile_traces_one_whole_graph(reading, dynamic):
    torch._dynamo.reset()
    module = reference.scatter(reading(2, dynamic=dynamic, neighborhood=2)).double().eval()
    x = normal(2, 2, 3, 5).double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x), gradients(module, x), rtol=1e-11, atol=1e-13)


@pytest.mark.slow  # the C++ compiler takes its time
def test_compiled_code_is_the_eager_one():
    torch._dynamo.reset()
    module, x = reference.scatter(Sparta(2)).double(), normal(2, 2, 3, 5).double()
    x = x.contiguous(memory_format=torch.channels_last)
    compiled = gradients(torch.compile(module, fullgraph=True), x)
    torch.testing.assert_close(compiled, gradients(module, x), rtol=1e-11, atol=1e-13)
    assert compiled[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reading", READINGS)
def test_export(reading):
    module, x = reference.scatter(reading(2)).double().eval(), normal(2, 2, 4, 5).double()
    batch = {0: torch.export.Dim("batch", min=1)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x), module(x), rtol=1e-12, atol=1e-14)
    more = normal(5, 2, 4, 5, seed=3).double()
    torch.testing.assert_close(exported(more), module(more), rtol=1e-12, atol=1e-14)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_equal_and_apart(reading, duplicate, frozen):
    module, x = reference.scatter(reading(3, neighborhood=2)).eval(), normal(2, 3, 5, 4)
    module = module.freeze() if frozen else module
    twin = duplicate(module)
    assert type(twin) is reading
    assert repr(twin) == repr(module)
    assert twin.frozen == frozen
    assert [p.requires_grad for p in twin.parameters()] == [not frozen] * len(list(twin.parameters()))
    y = module(x)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.conv2.add_(1)
    assert torch.equal(module(x), y)
    assert not torch.equal(twin(x), y)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("reading", READINGS)
def test_state_dict_round_trip(reading, dynamic):
    module, x = reference.scatter(reading(3, dynamic=dynamic)).eval(), normal(2, 3, 5, 4)
    names = {name for name in module.state_dict() if not name.startswith("norm")}
    assert names == {"conv1", "conv2", "conv3", "conv4", "conv6" if dynamic else "conv5"}
    other = reading(3, dynamic=dynamic).eval()
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match=r"conv[56]"):
        reading(3, dynamic=not dynamic).load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize("reading", READINGS)
def test_functional_call_uses_the_given_parameters(reading):
    module, other = (reference.scatter(reading(3), seed).eval() for seed in (0, 1))
    x = normal(2, 3, 5, 4)
    y = module(x)
    assert torch.equal(functional_call(module, other.state_dict(), x), other(x))
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("reading", READINGS)
def test_vmap(reading):
    modules = [reference.scatter(reading(3), seed).double().eval() for seed in range(3)]
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


@pytest.mark.parametrize("reading", READINGS)
def test_compiled_transforms(reading):
    if torch.__version__ < "2.5" and "Normed" in reading.__name__:
        pytest.skip("this torch cannot compile vmap over batch norm")
    module, x = reference.scatter(reading(3), 0).double().eval(), normal(4, 3, 5, 6).double()

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


@pytest.mark.parametrize("reading", READINGS)
def test_moves(reading):
    module = reading(3)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        tensors = [*module.to(dtype).parameters(), *module.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    with torch.device("meta"):
        empty = reading(3)
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu").reset_parameters()
    assert empty.conv1.abs().max() > 0
    assert empty.conv2.abs().max() == 0


# ---- frozen


def train_step(module, x):
    """One step of everything that could move a parameter."""
    weight = nn.Parameter(torch.ones(3, 1, 1))
    optimizer = torch.optim.SGD([weight, *module.parameters()], lr=0.1, momentum=0.9, weight_decay=0.1)
    (module(x * weight).square().sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("reading", READINGS)
def test_frozen_does_not_move(reading):
    module, x = reference.scatter(reading(3)), normal(4, 3, 5, 6)
    assert module.freeze() is module
    assert module.extra_repr() == "3, frozen"
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
    assert torch.autograd.grad(module(x).sum(), x)[0].abs().max() > 0  # what an attack needs


@pytest.mark.parametrize("reading", READINGS)
def test_unfrozen_learns_again(reading):
    module, x = reference.scatter(reading(3)), normal(4, 3, 5, 6)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert module.freeze().unfreeze() is module
    assert module.extra_repr() == "3"
    assert all(m.training for m in module.modules())
    train_step(module, x)
    assert not any(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not module.eval().training
    assert module.train().training


# ---- errors


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (3, 5, 6), (2, 3, 5), (3,), (1, 2, 3, 4, 5)])
def test_wrong_input_is_refused(reading, shape):
    text = f"{reading.__name__}(3) was given {shape}; it takes (N, 3, H, W)"
    for call in (reading(3), reading(3).attention, reading(3).scores):
        with pytest.raises(ShapeError) as error:
            call(torch.zeros(shape))
        assert str(error.value) == text
    assert issubclass(ShapeError, SpartaError)
    assert issubclass(SpartaError, ValueError)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
@pytest.mark.parametrize("reading", READINGS)
def test_impossible_arguments_are_refused(reading, value):
    for name, arguments in [("in_channels", {}), ("neighborhood", {"in_channels": 3})]:
        with pytest.raises(ShapeError) as error:
            reading(**arguments, **{name: value})
        text = f"{reading.__name__}: {name} must be a whole number of at least 1, not {value!r}"
        assert str(error.value) == text


def test_repr_shows_the_arguments():
    assert repr(Sparta(16)) == "Sparta(16)"
    assert repr(PooledSparta(16, dynamic=False, neighborhood=4)) == (
        "PooledSparta(16, dynamic=False, neighborhood=4)"
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


def test_dynamic_is_a_bool_and_maps_are_not_empty():
    with pytest.raises(ShapeError, match="dynamic must be True or False, not 'False'"):
        Sparta(4, dynamic="False")
    with pytest.raises(ShapeError, match=r"was given \(1, 4, 0, 3\)"):
        Sparta(4)(torch.rand(1, 4, 0, 3))
