"""What is refused, in which words, and that the model is then as it was."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from tests.helpers import nets
from tests.package.test_surgery import IMAGES, Probe, assert_same, assert_untouched, outputs, state


class Discarded(nets.Block):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)
        F.relu_(out)
        return out


class Unused(nets.Block):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)
        y = torch.relu_(out)  # noqa: F841
        return out


class Loop(nets.Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.shortcut(x)
        for _ in range(1):
            out = F.relu(out)
        return out


class Helper(nets.Block):
    def forward(self, x):
        return self.activate(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.shortcut(x))

    def activate(self, x):
        return F.relu(x)


class Starred(nets.Block):
    def forward(self, x):
        inputs = [self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.shortcut(x)]
        return F.relu(*inputs)


class Named(nets.Functional):
    sparta = True


class Opaque:
    """A decorator that is no function."""

    def __init__(self, forward):
        self.__wrapped__ = forward

    def __get__(self, module, cls):
        return types.MethodType(self.__wrapped__, module) if module is not None else self


class Decorated(nets.Functional):
    @Opaque
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.shortcut(x))


class Again(nets.TwoModules):
    """Calls another activation than ReLU once more, by a name that nobody can read."""

    def forward(self, x):
        y = super().forward(x)
        last = getattr(self, "2tca"[::-1])
        return y if isinstance(last, nn.ReLU) else last(y)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            Discarded,
            r"line \d+ \(Discarded.forward\) throws the result of the ReLU away; write x = F.relu\(x\)",
        ),
        (Unused, "G1.B1: the block does not use what its ReLU returns"),
        (Loop, "calls the ReLU in a loop"),
        (
            Helper,
            r"called in activate \(.*test_surgery_refusals.py:\d+\), not in one expression of Helper.forward",
        ),
        (Starred, "hides the input of the ReLU"),
        (Named, "has an attribute 'sparta' already"),
        (Decorated, "a decorator of Decorated.forward hides it"),
        (Again, "new activations must run once in evaluation mode, but ran: G1.B1: 2 times"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_blocks_that_are_refused(block, problem):
    net = nets.Net(block)
    before, expected = state(net), [outputs(net, training) for training in (False, True)]
    with pytest.raises(SiteError, match=problem):
        replace_relus(net, "stem.2,G1.B1", Probe)
    assert_untouched(net, before)
    for training in (False, True):
        assert_same(outputs(net, training), expected[training])
    replace_relus(net, "stem.2", Probe)


def test_one_reason_is_not_told_for_each_of_many_blocks():
    net = nn.Sequential(nets.conv3(3, 8), nn.Sequential(*(Loop(8, 8, 1) for _ in range(9))))
    with pytest.raises(SiteError) as error:
        replace_relus(net, "G1.B*", Probe, example=IMAGES)
    reasons = [line for line in str(error.value).splitlines() if line.startswith("G1.B*: ")]
    assert [line[7:12] for line in reasons] == ["G1.B1", "G1.B2", "G1.B3", "6 mor"]
    assert all("calls the ReLU in a loop" in line for line in reasons)


def test_a_shared_block_is_refused():
    net = nets.Net(nets.Functional)
    net.layer1[1] = net.layer1[0]
    with pytest.raises(
        SiteError, match=r"G1.B1 \(layer1.0\) cannot be replaced: it runs 2 times in one pass"
    ):
        replace_relus(net, "G1.B1", Probe)


def test_a_relu_that_is_called_twice_goes_by_its_block():
    with pytest.raises(
        SiteError, match=r"layer1.0.relu .* is called 2 times in one pass; name the module that calls it"
    ):
        replace_relus(nets.Net(nets.OneModule), "layer1.0.relu", Probe)


class BadShape(nn.Module):
    def forward(self, x):
        return x[..., :1]


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("five channels, please")


SHARED = nn.GELU()


@pytest.mark.parametrize(
    ("activation", "problem"),
    [
        (
            lambda c: BadShape(),
            r"G1.B1: an activation must keep the shape \(2, 4, 32, 32\), not return \(2, 4, 32, 1\)",
        ),
        (lambda c: Fails(), "the network fails: RuntimeError: five channels, please"),
        (lambda c: torch.relu, r"activation\(4\) for G1.B1 must be an nn.Module, not <built-in"),
        (lambda c: SHARED, "several sites got the same one"),
        (lambda c: nn.LazyConv2d(c, 1), "weight has no values yet"),
        (Probe(4), "activation is one Probe with parameters or buffers, for all sites; give a function"),
        (nn.Threshold, "is called with the channel count, which failed: .*For a module that takes other arg"),
        (4, 'a mapping from labels to modules, or the name of a set such as "cifar10-resnet18", not 4'),
        ({"G1.B1": Probe(4), "G2.B1": 8}, r"each label a module, .*; no module: 'G2.B1' \(int\)"),
        ({}, "each label a module, .*; this one is empty"),
        (nn.ModuleDict({"G1": Probe(4)}), "activation is one ModuleDict with parameters or buffers"),
    ],
)
@pytest.mark.parametrize("block", [nets.Functional, nets.TwoModules])
def test_activations_that_are_refused(activation, problem, block):
    net = nets.Net(block)
    before = state(net)
    with pytest.raises(SiteError, match=rf"{problem}[\s\S]*[.\n ]Nothing was changed\.$"):
        replace_relus(net, "G*.B1", activation)
    assert_untouched(net, before)


def test_an_error_of_the_activation_is_passed_on():
    net = nets.Net(nets.Functional)
    before = state(net)
    with pytest.raises(ZeroDivisionError):
        replace_relus(net, "G*.B1", lambda channels: Probe(channels) if channels < 8 else 1 / 0)
    assert_untouched(net, before)


@pytest.mark.parametrize(
    ("sites", "problem"),
    [
        ("G3.B1", "there is no group 3, the network has 2 groups of blocks"),
        ("G0.B1", "there is no group 0"),
        ("G-3.B1", "there is no group -3"),
        ("G*.B3", "there is no block 3 in group 1, which has 2"),
        ("G{1,2}.B{1,-3}", "there is no block -3 in group 2, which has 2"),
        ("layer1.9", "layer1.9: no ReLU that runs on feature maps has this name"),
        ("layer3.*", r"layer3.\*: no ReLU"),
        ("head", "head: no ReLU"),
        ("G1.B1,,G1.B2", "empty name: extra comma"),
        ("unused", "unused: no ReLU"),
        ("", "sites must be a text such as"),
        ([], r"or a list of such texts or of sites from relu_sites, not \[\]"),
        (["G1.B1", ""], r"not \['G1.B1', ''\]"),
        (["G1.B1", 2], r"not \['G1.B1', 2\]"),
        (4, "not 4"),
        (["G1.B1", "G7.B1"], "at 'G1.B1, G7.B1':\\nG7.B1: there is no group 7"),
    ],
)
def test_names_that_do_not_fit(sites, problem):
    net = nets.Net(nets.Functional)
    before = state(net)
    with pytest.raises(SiteError, match=rf"{problem}[\s\S]*[.\n ]Nothing was changed\.$"):
        replace_relus(net, sites, Probe)
    assert_untouched(net, before)


def test_all_bad_names_are_listed_at_once_beside_what_there_is():
    with pytest.raises(SiteError) as error:
        replace_relus(nets.Net(nets.Functional), "G1.B1, G7.B1, nothing.*", Probe)
    assert str(error.value).splitlines() == [
        "cannot replace ReLU at 'G1.B1, G7.B1, nothing.*':",
        "G7.B1: there is no group 7, the network has 2 groups of blocks",
        "nothing.*: no ReLU that runs on feature maps has this name",
        "This network has:",
        *str(relu_sites(nets.Net(nets.Functional))).splitlines(),
        "Nothing was changed.",
    ]
    with pytest.raises(SiteError, match=r"the network has no groups of blocks, only dotted names"):
        replace_relus(nets.Plain(), "G*.B1", Probe, example=IMAGES)


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        ("G2.B1", ["G2.B1"]),
        ("G*.B2", ["G1.B2", "G2.B2"]),
        (" G{1, 2}.B{2} ", ["G1.B2", "G2.B2"]),
        ("G*.B-1,G1.B*", ["G1.B1", "G1.B2", "G2.B2"]),
        ("G-1.B{-2,2},layer1.0", ["G1.B1", "G2.B1", "G2.B2"]),
        ("layer?.1", ["G1.B2", "G2.B2"]),
        ("layer[2]*,stem.2", ["G2.B1", "G2.B2", ""]),
    ],
)
def test_the_language_of_sites(sites, labels):
    net = nets.Net(nets.Functional)
    names = {s.name: s.label for s in relu_sites(net)}
    replace_relus(net, sites, Probe)
    assert [
        label for name, label in names.items() if Probe in map(type, net.get_submodule(name).modules())
    ] == labels


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            lambda: torch.jit.trace(nets.Net(nets.Functional).eval(), IMAGES),
            "is a ScriptModule: replace the ReLUs first",
        ),
        (
            lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()),
            r"0.weight has no values yet \(a lazy or meta tensor\)",
        ),
        (lambda: nets.Net(nets.Functional).to("meta"), "conv1.weight has no values yet"),
        (lambda: nets.Net, "the model must be an nn.Module, not a type"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
            "no convolution to deduce an input from: pass example=",
        ),
        (
            lambda: nets.Plain(),
            r"does not run in training mode on an example of shape \[\(2, 3, 32, 32\)\]: .*\nPass",
        ),
    ],
)
def test_models_that_are_refused(model, problem):
    with pytest.raises(SiteError, match=problem):
        replace_relus(model(), "G1.B1", Probe)


def test_wrapped_for_training_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = replace_relus(nets.Net(nets.Functional), "G1.B1", Probe)
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped(IMAGES).sum().backward()
        assert net.layer1[0].sparta.slope.grad is not None
        for operate in (relu_sites, restore_relus, lambda m: replace_relus(m, "G1.B2", Probe)):
            with pytest.raises(
                SiteError, match="is a DistributedDataParallel: replace the ReLUs first, then make the opt"
            ):
                operate(wrapped)
    finally:
        torch.distributed.destroy_process_group()


class Block(nn.Module):
    """A residual block; its children change one thing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def body(self, x):
        return self.conv(F.relu(x)) * self.gamma

    def forward(self, x):
        return F.relu(self.body(x) + x)


class InPlaceUsedAgain(Block):
    def forward(self, x):
        y = self.body(x) + x
        z = F.relu(y, inplace=True)
        return z + y  # y is rectified too


class AsksForItsClass(Block):
    def forward(self, x):
        y = F.relu(self.body(x) + x)
        return y if type(self) is AsksForItsClass else y + 1


class WritesToAParameter(Block):
    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("sparse", torch.eye(4).to_sparse())

    def forward(self, x):
        if self.training:
            self.code.add_(1)
        return F.relu(self.body(x) + x)


def net_of(block):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(block(), block()), nn.Flatten())


class ComparesItsClass(Block):
    def forward(self, x):
        y = F.relu(self.body(x) + x)
        return y + (self.__class__ == ComparesItsClass) * 0


class CountsInItsClass(Block):
    passes = 0

    def forward(self, x):
        type(self).passes += 1
        return F.relu(self.body(x) + x)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            InPlaceUsedAgain,
            "G1.B1: a forward uses what an in-place activation has changed, through another name or a view",
        ),
        (AsksForItsClass, "AsksForItsClass.forward asks for its own class, which would be another"),
        (ComparesItsClass, "ComparesItsClass.forward asks for its own class"),
        (CountsInItsClass, "CountsInItsClass.forward asks for its own class"),
    ],
)
def test_a_network_that_would_change_even_with_relu_is_refused(block, problem):
    net, x = net_of(block), torch.rand(2, 3, 8, 8)
    before = net(x)
    with pytest.raises(SiteError, match=problem):
        replace_relus(net, "G1.B1", lambda channels: nn.Hardtanh(0, 0.5))
    assert torch.equal(net(x), before)
    assert type(net[1][0]) is block


def test_parameters_and_sparse_buffers_are_left_alone():
    net = net_of(WritesToAParameter).train()
    replace_relus(net, "G1.B1", lambda channels: nn.Hardtanh(0, 0.5))
    assert torch.equal(net[1][0].code, torch.zeros(4))


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_parametrized_blocks_are_refused_before_and_after():
    net = net_of(Block)
    replace_relus(net, "G1.B*", lambda channels: nn.Hardtanh(0, 0.5))
    parametrize.register_parametrization(net[1][0], "gamma", Twice())
    with pytest.raises(
        SiteError, match=r"Block got another class since they were replaced, as torch\.nn\.utils\.parametrize"
    ):
        restore_relus(net)
    parametrize.remove_parametrizations(net[1][0], "gamma")
    restore_relus(net)
    assert [type(block) for block in net[1]] == [Block, Block]
    parametrize.register_parametrization(net[1][0], "gamma", Twice())
    with pytest.raises(SiteError, match="is parametrized"):
        replace_relus(net, "G1.B1", lambda channels: nn.Hardtanh(0, 0.5))


def test_a_label_misspelt_is_explained():
    with pytest.raises(SiteError, match=r"g1\.b1: no ReLU .* has this name; labels look like G4\.B2"):
        replace_relus(net_of(Block), "g1.b1")
