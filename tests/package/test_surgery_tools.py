"""A changed network in the hands of other tools, and the networks of public libraries."""

import copy
import importlib
import inspect
import io
import linecache
import pickle
import subprocess
import sys
import traceback
from itertools import pairwise

import pytest
import torch
from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from tests.helpers import nets
from tests.package.test_surgery import IMAGES, Overriding, Probe, assert_same

EDITS = [nets.OneModule, nets.TwoModules]  # a rewrite and a swap
each_edit = pytest.mark.parametrize("block", EDITS)


def changed(block):
    return replace_relus(nets.Net(block), "G*.B2", Probe).eval()


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_edit
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_file])
def test_copies_compute_the_same_and_can_be_restored(block, through):
    net = changed(block)
    twin = through(net)
    assert_same(twin(IMAGES), net(IMAGES))
    assert type(twin.layer1[1]) is type(net.layer1[1])
    with torch.no_grad():
        net.layer1[1].get_submodule("sparta" if block is nets.OneModule else "act2").slope.zero_()
    assert not torch.equal(twin(IMAGES), net(IMAGES))  # nothing is shared
    restore_relus(twin)
    assert list(twin.state_dict()) == list(nets.Net(block).state_dict())
    assert type(twin.layer1[1]) is block


@pytest.mark.slow
def test_a_pickle_in_a_fresh_program(tmp_path):
    net = changed(nets.ManyLines)
    torch.save((net, IMAGES, net(IMAGES)), tmp_path / "net.pt")
    program = """if True:
        import sys, torch
        net, x, y = torch.load(sys.argv[1], weights_only=False)
        print((net(x) - y).abs().max())
    """
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "net.pt"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tensor(0.," in out.stdout


OWN = """from tests.helpers.nets import Block, F

class Own(Block):
    def forward(self, x):
        return F.relu(self.conv1(x) + x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Imports, anew, a module with the given text."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(text):
        sys.modules.pop("own", None)
        (tmp_path / "own.py").write_text(text)
        linecache.checkcache(str(tmp_path / "own.py"))
        importlib.invalidate_caches()
        module = importlib.import_module("own")
        return nn.Sequential(nets.conv3(3, 4), nn.Sequential(module.Own(4, 4, 1)))

    yield load
    sys.modules.pop("own", None)


def test_a_pickle_is_tied_to_its_source(own):
    net = replace_relus(own(OWN), "G1.B1", Probe)
    stored, expected = pickle.dumps(net), net(IMAGES)
    own("# one line more\n" + OWN)
    assert_same(pickle.loads(stored)(IMAGES), expected)
    own(OWN.replace("+ x", "- x"))
    with pytest.raises(SiteError, match=r"the source of own.Own.forward is not the one that was changed"):
        pickle.loads(stored)


def test_a_source_that_is_not_what_runs(own, tmp_path):
    net = own(OWN)
    for text in (OWN.replace("+ x", "- x"), OWN.replace("self, x", "self, y"), OWN[:30], OWN[:-5]):
        (tmp_path / "own.py").write_text(text)
        linecache.checkcache(str(tmp_path / "own.py"))
        with pytest.raises(SiteError, match=r"the source of Own.forward has changed since it was imported"):
            replace_relus(net, "G1.B1", Probe)


def test_the_new_source_is_there_to_see():
    class Broken(nn.Module):
        def forward(self, x):
            return x * self.factor

    net = nets.Net(nets.OneModule)
    Broken.factor = 2
    replace_relus(net, "G1.B1", lambda channels: Broken())
    assert inspect.getsource(net.layer1[0].forward) == inspect.getsource(nets.OneModule.forward).replace(
        "self.relu(out)", "self.sparta(out)"
    )
    del Broken.factor
    with pytest.raises(AttributeError) as error:
        net(IMAGES)
    assert "return self.sparta(out)" in "".join(traceback.format_exception(error.value))


@pytest.mark.slow
@each_edit
def test_compile_in_one_graph(block):
    net = nets.Net(block).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    before = compiled(IMAGES)
    assert replace_relus(compiled, "G*.B2", Probe) is compiled
    after = net(IMAGES)
    assert not torch.equal(before, after)
    assert_same(compiled(IMAGES), after)
    for wrapped in (compiled, nn.Sequential(nn.Identity(), compiled)):
        assert [s.label for s in relu_sites(wrapped) if s.problem] == ["G1.B2", "G2.B2"]
    assert_same(restore_relus(compiled)(IMAGES), before)


@each_edit
def test_under_autocast_and_in_data_parallel(block):
    net = changed(block)
    with torch.autocast("cpu", torch.bfloat16):
        other = nets.Net(block).eval()
        new = replace_relus(other, "G1.B1", Probe).layer1[0]
        other.head.weight.data.add_(1)
        assert torch.is_autocast_cache_enabled()
        found = other(IMAGES.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(found, other(IMAGES.float()))  # no pass has left its copies of the weights
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    assert_same(nn.DataParallel(net)(IMAGES), net(IMAGES))
    x = torch.ones(1, 4, 8, 8)
    assert_same(net._replicate_for_data_parallel().layer1[1](x), net.layer1[1](x))


def torchvision_18():
    return pytest.importorskip("torchvision.models").resnet18(num_classes=5)


def torchvision_bottleneck():
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [2, 2, 2, 2], groups=2, width_per_group=8)


def timm_18():
    return pytest.importorskip("timm").create_model("resnet18", drop_path_rate=0.0)


@pytest.mark.parametrize(
    ("make", "per_block", "edit"),
    [(torchvision_18, 2, "rewrite"), (torchvision_bottleneck, 3, "rewrite"), (timm_18, 2, "swap")],
)
def test_public_residual_networks(make, per_block, edit):
    net = make()
    x = torch.rand(2, 3, 64, 64)
    chosen = [per_block * b for b in (2, 4, 6, 8)]
    expected = []
    for training in (False, True):
        with Overriding(chosen):
            expected.append(copy.deepcopy(net).train(training)(x))
    assert {s.edit for s in relu_sites(net) if s.label} == {edit}
    replace_relus(net, "G*.B-1", Probe)
    for training in (False, True):
        assert_same(copy.deepcopy(net).train(training)(x), expected[training])


@pytest.mark.parametrize(
    ("library", "name", "labels", "site"),
    [
        (
            "torchvision.models",
            "regnet_y_400mf",
            "G1.B1 G2.B3 G3.B6 G4.B6",
            "trunk_output.block1.block1-0.activation",
        ),
        ("timm", "regnetx_002", "G1.B1 G2.B1 G3.B4 G4.B7", "s1.b1.act3"),
        ("timm", "resnetv2_18", "G1.B2 G2.B2 G3.B2 G4.B2", "stages.0.blocks.0.norm2.act"),
        ("timm", "resnest14d", "G1.B1 G2.B1 G3.B1 G4.B1", "layer1.0.act3"),
    ],
)
def test_public_networks_of_other_shapes(library, name, labels, site):
    module = pytest.importorskip(library)
    net = module.create_model(name) if library == "timm" else getattr(module, name)()
    sites = relu_sites(net)
    last = [a.label for a, b in pairwise(sites) if a.group != b.group]
    assert last == labels.split()
    assert sites[0].name == site
