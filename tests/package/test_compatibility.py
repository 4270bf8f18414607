"""A changed network in the hands of PyTorch's tools: the numbers that they must give."""

import copy
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from sparta_act import Sparta, replace_relus, restore_relus
from tests.helpers import nets, reference
from tests.helpers.changed_in_processes import EDITS, IMAGES, changed, state, train
from tests.package.test_surgery import Probe, assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
each_edit = pytest.mark.parametrize("block", EDITS)


def identity(channels):
    return Sparta(channels, identity=True, dynamic=False)


each_change = pytest.mark.parametrize(
    ("block", "activation"), [(EDITS[0], Sparta), (EDITS[1], identity), (EDITS[0], Probe)]
)
each_edit_in_a_mode = pytest.mark.parametrize(("block", "training"), [(EDITS[0], True), (EDITS[1], False)])
WHOLE = TorchVersion(torch.__version__) >= "2.13"  # graphs; an older torch may break them


def new_name(block):
    return "sparta" if block is nets.OneModule else "act2"


def new_modules(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, Sparta | Probe)}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def gradients(run, x, net):
    """Output of `run`, and gradients of a weighted sum of it: of the input and of all parameters."""
    x.requires_grad_()
    y = run(x)
    v = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * v).sum(), [x, *net.parameters()])]


def images(n=4):
    return IMAGES[:n].clone()


# ---- state


@pytest.mark.parametrize(
    ("library", "make", "key"),
    [
        ("torchvision", lambda m: m.models.resnet18(num_classes=5), "layer{}.1.sparta"),
        ("timm", lambda m: m.create_model("resnet18", num_classes=5), "layer{}.1.act2"),
    ],
)
def test_a_state_dict_of_the_unchanged_network_loads(library, make, key):
    module, x = pytest.importorskip(library), torch.rand(2, 3, 32, 32)
    net, other = make(module).eval(), reference.scatter(make(module)).eval()
    keys = list(net.state_dict())
    net.load_state_dict(make(module).state_dict(), strict=True)
    replace_relus(net, "G*.B2")
    names = ("conv1", "conv2", "conv3", "conv4", "conv6", "gain")
    added = {f"{key.format(g)}.{name}" for g in (1, 2, 3, 4) for name in names}
    assert [k for k in net.state_dict() if k not in added] == keys
    new = {k: v.clone() for k, v in net.state_dict().items() if k in added}
    found = net.load_state_dict(other.state_dict(), strict=False)
    assert (set(found.missing_keys), len(found.missing_keys), found.unexpected_keys) == (added, 24, [])
    assert_same({k: v for k, v in net.state_dict().items() if k not in added}, dict(other.state_dict()))
    assert_same({k: v for k, v in net.state_dict().items() if k in added}, new)
    twin = replace_relus(copy.deepcopy(other), "G*.B2")
    twin.load_state_dict(new, strict=False)
    assert_same(net(x), twin(x))
    assert not torch.allclose(net(x), other(x))
    assert_same(restore_relus(net)(x), other(x))


def through_torch(tensors, path):
    torch.save(tensors, path)
    return torch.load(path, weights_only=True)


def through_safetensors(tensors, path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(tensors, path)
    return files.load_file(path)


@each_change
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
def test_a_file_fills_a_fresh_network(block, activation, through, tmp_path):
    net, fresh = changed(block, activation), changed(block, activation, seed=1)
    assert not torch.allclose(fresh(IMAGES), net(IMAGES))
    fresh.load_state_dict(through(net.state_dict(), tmp_path / "net"))
    assert_same(fresh(IMAGES), net(IMAGES))


@each_edit
def test_the_average_of_weights(block):
    net, seen = changed(block), []
    averaged = AveragedModel(net)
    for _ in range(3):
        train(net, IMAGES, steps=1)
        averaged.update_parameters(net)
        seen.append(state(net))
    assert [n.removeprefix("module.") for n in new_modules(averaged)] == list(new_modules(net))
    twin = changed(block, seed=1)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            assert not torch.equal(seen[0][name], seen[2][name])
            parameter.copy_((seen[0][name] + seen[1][name] + seen[2][name]) / 3)
    assert_close(dict(averaged.module.named_parameters()), dict(twin.named_parameters()))
    for name, buffer in twin.named_buffers():
        buffer.copy_(seen[2][name])
    assert_close(averaged(IMAGES), twin(IMAGES))


@each_edit
@pytest.mark.parametrize("activation", [Sparta, identity])
def test_frozen_activations_do_not_move(block, activation):
    net = changed(block, activation)
    frozen, before = {n: m.freeze() for n, m in new_modules(net).items()}, state(net)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(IMAGES).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(net)
    for name, value in [*state(net).items(), *state(averaged.module).items()]:
        assert torch.equal(value, before[name]) == name.startswith(tuple(frozen)), name
    assert not any(m.training for new in frozen.values() for m in new.modules())


# ---- compilers


def small(block, training=False):
    """One changed block, since compilers take their time."""
    net = nn.Sequential(nn.Sequential(block(3, 2, 1)), nets.conv3(2, 2), nn.AvgPool2d(5), nn.Flatten())
    return reference.scatter(replace_relus(net, "G1.B1")).double().train(training)


def small_images(n=4):
    return images(n)[..., :5, :5].clone()


@pytest.mark.slow
@each_edit_in_a_mode
def test_traced_for_every_batch_size(block, training):
    net, twin = small(block, training), small(block, training)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=WHOLE)
    for n in (4, 2, 3):
        x = small_images(n)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(gradients(compiled, x, twin), gradients(net, small_images(n), net))
    assert_close(state(twin), state(net))  # batch norm's statistics
    if WHOLE:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow  # the C++ compiler takes its time
def test_compiled_for_every_size():
    net, twin = (small(nets.OneModule, training=True)[:2] for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(twin, dynamic=True, fullgraph=WHOLE)
    for shape in ((4, 3, 6, 7), (3, 3, 9, 5)):
        x = torch.rand(shape).double()
        assert_close(gradients(compiled, x.clone(), twin), gradients(net, x, net))
    assert_close(state(twin), state(net))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "strict"), [(EDITS[0], True), (EDITS[1], False)])
def test_export(block, strict):
    net, batch = small(block), {0: torch.export.Dim("batch", min=1)}
    exported = torch.export.export(net, (small_images(),), dynamic_shapes=(batch,), strict=strict).module()
    for x in (small_images(), torch.rand(7, 3, 5, 5).double()):
        assert_close(exported(x), net(x))


# ---- training


@each_edit
@pytest.mark.parametrize("activation", [Sparta, identity])
def test_autocast(block, activation):
    net, x = replace_relus(nets.Net(block), "G*.B2", activation).eval(), IMAGES.float()
    del net.unused
    for new in new_modules(net).values():
        reference.scatter(new)
    expected = gradients(net, x.clone(), net)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, x.clone(), net)
    assert found[0].dtype is torch.bfloat16
    assert {g.dtype for g in found[1:]} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).norm() < 0.25 * other.norm()


def pruned(module):
    prune.random_unstructured(module, "conv1", 0.5)
    return {"conv1": module.conv1}


def parametrized(module):
    parametrizations.spectral_norm(module, "conv3").eval()  # or each look changes it
    return {"conv3": module.conv3}


def normed(module):
    parametrizations.weight_norm(module, "conv6")
    with torch.no_grad():
        module.parametrizations.conv6.original0.mul_(2)
    return {"conv6": module.conv6}


def replicated(module):
    """As DataParallel does it on several GPUs."""
    parameters = dict(module.named_parameters())
    replica = module._replicate_for_data_parallel()
    for name, value in parameters.items():
        setattr(replica, name, 2 * value)
    module.forward = replica.forward
    return {name: 2 * value for name, value in parameters.items()}


@pytest.mark.parametrize("held", [pruned, parametrized, normed, replicated])
def test_weights_that_others_hold(held):
    module, plain = Sparta(6).double(), Sparta(6).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    instead = {name: value.detach() for name, value in held(module).items()}
    found, before = module(x), plain(x)
    assert not torch.allclose(found, before)
    plain.load_state_dict(instead, strict=False)
    assert_close(found, plain(x))


@each_edit
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(block, use_reentrant):
    part, calls = changed(block).layer1[1].train(), []
    x = torch.rand(4, 4, 6, 6).double()
    twin = copy.deepcopy(part)
    part.get_submodule(new_name(block)).register_forward_pre_hook(lambda m, x: calls.append(x))
    found = gradients_by_backward(lambda x: checkpoint(part, x, use_reentrant=use_reentrant), x, part)
    assert len(calls) == 2
    assert_same(found, gradients_by_backward(twin, x, twin))


def gradients_by_backward(run, x, net):
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in net.parameters())]


@each_edit
def test_threads(block):
    """Forward and backward of one network by four threads at once."""
    net = changed(block)
    batches = [torch.rand(2, 3, 16, 16).double() for _ in range(16)]
    expected = [gradients(net, x, net) for x in batches]
    barrier = threading.Barrier(4, timeout=10)  # after an error the last threads would wait for ever

    def work(x):
        barrier.wait()
        return gradients(net, x.detach().clone(), net)

    with ThreadPoolExecutor(4) as pool:
        assert_close(list(pool.map(work, batches)), expected)


@each_edit
def test_hooks_run_once_in_each_pass(block):
    net, calls, outputs = restore_relus(changed(block)), Counter(), {}

    def watch(name, module):
        module.register_forward_pre_hook(lambda m, x: calls.update([f"{name} pre"]))
        module.register_forward_hook(lambda m, x, y: calls.update([f"{name} after"]))
        module.register_forward_hook(lambda m, x, y: outputs.update({name: y.detach()}))
        module.register_full_backward_pre_hook(lambda m, g: calls.update([f"{name} backward pre"]))
        module.register_full_backward_hook(lambda m, g, h: calls.update([f"{name} backward"]))

    part = net.layer1[1]
    watch("block before", part)
    watch("net before", net)
    replace_relus(net, "G*.B2")
    watch("block", part)
    watch("net", net)
    watch("new", part.get_submodule(new_name(block)))
    for training in (False, True):
        calls.clear()
        net.train(training)(images().requires_grad_()).sum().backward()
        assert set(calls.values()) == {1}
        assert len(calls) == 20
        assert_same(outputs["new"], outputs["block"])


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """What two processes have found; each network by data parallelism and, where there is that, sharded."""
    out = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, root / "tests/helpers/changed_in_processes.py", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@each_edit
def test_data_parallel_processes(block, in_processes):
    net = changed(block)
    expected = train(net, IMAGES), state(net)
    for found in in_processes:
        assert_close(found["data_parallel"][EDITS.index(block)], expected)
    assert_same(*(found["data_parallel"][EDITS.index(block)] for found in in_processes))


@pytest.mark.slow
@each_edit
def test_sharded_processes(block, in_processes):
    if "fully_sharded" not in in_processes[0]:
        pytest.skip("this torch shards on GPUs only")
    net = changed(block)
    expected = [train(net, IMAGES), state(net)]
    results = [found["fully_sharded"][EDITS.index(block)] for found in in_processes]
    for gradient, after, _, *refusals, unsaved in results:
        assert_close([gradient, after], expected)
        assert len(refusals) == 6
        assert "gain is sharded (FSDP): gather it into a network that is not" in unsaved
        assert all(
            r.startswith("SiteError: ") and "is a FSDPModule: replace the ReLUs" in r for r in refusals
        )
    assert_close(torch.cat([y for _, _, y, *_ in results]), net(IMAGES))


# ---- functions of functions


@each_change
def test_functional_calls(block, activation):
    net, twin = changed(block, activation), changed(block, activation)
    scaled = {n: p.detach() * 1.1 for n, p in net.named_parameters()}
    twin.load_state_dict(scaled, strict=False)
    y = net(IMAGES)
    assert_close(functional_call(net, scaled, IMAGES), twin(IMAGES))  # torch.matmul asks who needs gradients
    assert_same(net(IMAGES), y)
    assert not torch.allclose(twin(IMAGES), y)


def loss(net):
    return lambda parameters, x: functional_call(net, parameters, x[None]).square().sum()


@each_change
def test_gradients_of_each_sample(block, activation):
    net = changed(block, activation)
    p = {n: v.detach() for n, v in net.named_parameters()}
    found = vmap(grad(loss(net)), in_dims=(None, 0))(p, IMAGES)
    for i, x in enumerate(IMAGES):
        one = torch.autograd.grad(net(x[None]).square().sum(), [*net.parameters()])
        assert_close([g[i] for g in found.values()], list(one))


@each_change
def test_derivatives_along_a_direction(block, activation):
    net, x, v = changed(block, activation), images(1), torch.randn(1, 3, 16, 16).double()
    h = 1e-6
    slope = (net(x + h * v) - net(x - h * v)) / (2 * h)
    jacobian = jacrev(net)(x)  # (1, 5, 1, 3, 16, 16)
    torch.testing.assert_close((jacobian * v).sum((2, 3, 4, 5)), slope, rtol=1e-5, atol=1e-7)
    if activation is Probe:  # our own backwards have no forward mode
        torch.testing.assert_close(jvp(net, (x,), (v,))[1], slope, rtol=1e-5, atol=1e-7)
    else:
        with pytest.raises(NotImplementedError, match="jvp"):
            jvp(net, (x,), (v,))
