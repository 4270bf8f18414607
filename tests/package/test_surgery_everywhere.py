"""`replace_relus(net, "all")`: every ReLU call on a feature map, counted without the surgery."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import benchmarks.peers  # noqa: F401  # which lets torchvision load
from sparta_act import Sparta, relu_sites, replace_relus, restore_relus
from sparta_act.errors import SiteError
from tests.helpers import nets
from tests.package.test_surgery import IMAGES, MANNERS, Probe, assert_same, assert_untouched, outputs, state

torchvision = pytest.importorskip("torchvision")


class Calls(TorchFunctionMode):
    """Counts the calls of ReLU, or of others, on maps and elsewhere."""

    def __init__(self, names=("relu", "relu_")):
        super().__init__()
        self.names, self.on = names, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.names:
            x = args[0] if args else kwargs["input"]
            self.on["maps" if x.ndim == 4 and x.shape[2:].numel() > 1 else "elsewhere"] += 1
        return func(*args, **kwargs or {})


def calls_of(net, size=64, names=("relu", "relu_")):
    """The calls in evaluation and in training mode."""
    found = []
    for training in (False, True):
        with Calls(names) as calls, torch.no_grad():
            net.train(training)(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        found.append((calls.on["maps"], calls.on["elsewhere"]))
    return found


NETWORKS = [  # calls on maps and on less, in evaluation and in training mode
    ("resnet18", {}, 64, [(17, 0), (17, 0)]),
    pytest.param("densenet121", {}, 64, [(121, 0), (121, 0)], marks=pytest.mark.slow),
    ("regnet_y_400mf", {}, 64, [(49, 16), (49, 16)]),
    ("mobilenet_v3_small", {}, 64, [(5, 9), (5, 9)]),
    pytest.param("inception_v3", {"init_weights": False}, 299, [(94, 0), (95, 1)], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "arguments", "size", "expected"), NETWORKS)
def test_all_means_every_call_on_a_map(name, arguments, size, expected):
    net = torchvision.models.get_model(name, weights=None, **arguments)
    assert calls_of(net, size) == expected
    example = torch.rand(2, 3, size, size)
    replace_relus(net, "all", nn.SiLU, example=example)
    if name == "inception_v3":  # a convolution of its auxiliary classifier leaves a map of one pixel
        expected = [(94, 0), (96, 0)]
    assert calls_of(net, size) == [(0, elsewhere) for _, elsewhere in expected]
    on_maps = [n for n, _ in expected]
    added = [m for m in net.modules() if isinstance(m, nn.SiLU)]
    assert len(added) == max(on_maps)
    assert [sum(of_mode) for of_mode in calls_of(net, size, ("silu",))] == on_maps
    lines = str(relu_sites(net, example=example)).splitlines()
    rest = f", {expected[1][1]} elsewhere" if expected[1][1] else ""
    assert lines[-2] == f'0 calls of ReLU on feature maps ("all"){rest}'
    assert lines[-1].startswith(f"{len(added)} replaced: ")
    restore_relus(net)
    assert [sum(of_mode) for of_mode in calls_of(net, size)] == [*map(sum, expected)]


def test_all_of_other_kinds():
    net = torchvision.models.mobilenet_v3_small()
    replace_relus(net, "all", nn.SiLU, kinds="relu, hardswish")
    assert calls_of(net) == [(0, 9)] * 2  # those of the squeeze-and-excitation, on one pixel
    assert calls_of(net, names=("hardswish", "hardswish_")) == [(0, 1)] * 2  # of the classifier
    assert sum(isinstance(m, nn.SiLU) for m in net.modules()) == 5 + 18


def test_maps_with_channels_last_are_named():
    net = torchvision.models.convnext_tiny()
    before = state(net)
    with pytest.raises(SiteError, match=r"all: there is nothing to replace\n[\s\S]*but gelu"):
        replace_relus(net, "all", nn.SiLU)
    with pytest.raises(SiteError) as error:
        replace_relus(net, "all", nn.SiLU, kinds="gelu")
    lines = str(error.value).splitlines()
    assert lines[0] == "cannot replace gelu at 'all':"
    assert lines[1].startswith("all: features.1.0.block cannot be replaced: it runs on maps with channels l")
    assert lines[4].startswith(
        "all: 15 more, too: it runs on maps with channels last; call it on (N, C, ...)"
    )
    assert_untouched(net, before)


OTHERWISE = {
    nets.OneLine: "the block does not use what its ReLU returns",
    nets.Conditional: r"line \d+ \(Conditional.forward\) calls ReLU in a branch that no pass",
    nets.Inherited: "its ReLU is called in forward .*nets.py:.*, not in one expression of Inherited.forward",
}


@pytest.mark.parametrize("block", [manner[0] for manner in MANNERS])
def test_all_in_each_manner(block):
    """Against the oracle: every call computes otherwise, but for those on vectors."""
    net = nets.Net(block)
    before = state(net)
    if block in OTHERWISE:
        with pytest.raises(SiteError, match=OTHERWISE[block]):
            replace_relus(net, "all", Probe)
        assert_untouched(net, before)
        return
    vectors = {nets.SqueezeLast: [2, 4, 6, 8]}.get(block, [])
    for training in (False, True):
        count = outputs(net, training)[0]
        chosen = {*range(count - 1)} - {*vectors}  # the last one is the head's
        expected = outputs(net, training, chosen)[1]
        replace_relus(net, "all", Probe)
        assert_same(outputs(net, training)[1], expected)
        restore_relus(net)
    assert_untouched(net, before)


class Written(nn.Module):
    """All of it in one forward: nested, in methods of tensors, over several lines."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.sparta_2 = 7  # of somebody else

    def forward(self, x):
        x = F.relu(self.b(self.a(x).relu()), inplace=True).relu()
        é = self.c(
            F.relu(  # of two bytes: é
                input=x * 2
            )
        )
        return torch.relu(é).mean((2, 3)).relu()


def test_calls_in_calls_in_the_forward_of_the_network_itself():
    net = Written().eval()
    before, expected = state(net), outputs(net, False, {0, 1, 2, 3, 4})[1]
    assert 'called in the forward of the network itself, which has no name; replace "all"' in str(
        relu_sites(net)
    )
    replace_relus(net, "all", Probe)
    assert_same(outputs(net, False)[1], expected)
    names = [n for n, m in net.named_modules() if isinstance(m, Probe)]
    assert names == ["sparta_1", "sparta_3", "sparta_4", "sparta_5", "sparta_6"]  # in the order of the text
    assert [m.sparta_site for m in net.modules() if isinstance(m, Probe)] == names
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin).__name__ == "Written"
        assert_same(outputs(twin, False)[1], expected)
        twin.load_state_dict(net.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)
    assert_same(compiled(IMAGES), expected[0])
    assert_untouched(restore_relus(net), before)


def test_some_first_and_then_all_others():
    net = nets.Net(nets.OneModule)
    before = state(net)
    replace_relus(net, "G*.B2", lambda channels: Probe(channels))
    replace_relus(net, "all", nn.SiLU)
    assert [type(net.layer1[i].sparta).__name__ for i in (0, 1)] == ["SiLU", "Probe"]
    assert [type(b.sparta_1).__name__ for b in (net.layer1[0], net.layer2[0])] == ["SiLU"] * 2
    assert [type(b.relu).__name__ for b in (net.layer1[1], net.layer2[1])] == [
        "SiLU"
    ] * 2  # its one call left
    assert calls_of(copy.deepcopy(net)) == [(0, 1)] * 2
    restore_relus(net)
    replace_relus(net, "G*.B*, stem.2", nn.SiLU)
    halved = copy.deepcopy(net)
    replace_relus(net, "all", Probe)
    for training in (False, True):
        assert_same(outputs(net, training)[1], outputs(halved, training, {0, 1, 2, 3})[1])
    twin = pickle.loads(pickle.dumps(net))
    assert_same(outputs(twin, False), outputs(net, False))
    with pytest.raises(SiteError, match="all: there is nothing to replace"):
        replace_relus(net, "all", Probe)
    with pytest.raises(SiteError, match="it is replaced already; to replace it again, call restore_relus"):
        replace_relus(net, "G1.B1", Probe)
    assert_untouched(restore_relus(net), before)


class Sometimes(nets.Block):
    """Ways that no pass on the example takes."""

    flag, extra, act = False, None, None

    def __init__(self, *args):
        super().__init__(*args)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        if self.flag:
            out = F.relu(out - 1)
        if self.extra is not None and x.shape[0] == 77:
            out = self.extra(out)
        if x.ndim == 77:
            out = self.relu(F.relu(out))
            raise ValueError
        return self.bn2(self.conv2(out)) + self.shortcut(x)


@pytest.mark.parametrize("waiting", [None, nn.Sequential(nn.ReLU())])
def test_branches_that_no_pass_runs_are_named(waiting):
    net = nets.Net(Sometimes)
    for module in net.modules():
        if isinstance(module, Sometimes):
            module.extra = waiting
    before = state(net)
    with pytest.raises(SiteError) as error:
        replace_relus(net, "all", nn.SiLU)
    problems = [line for line in str(error.value).splitlines() if line.startswith("all: ")]
    line = Sometimes.forward.__code__.co_firstlineno
    asked = [f"line {line + 3}"] + ([f"line {line + 5}"] if waiting else [])
    assert [p.split(" (")[0].split(": ")[-1] for p in problems if "layer1.0 " in p] == asked
    assert "in a branch that no pass on the example runs; give example=... that runs it" in problems[0]
    assert_untouched(net, before)


class Helped(nn.Module):
    """What a helper method does, by a flag: nothing, or one of these."""

    flag = ""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), None
        self.waiting = nn.Sequential(nn.ReLU())

    def plain(self, x):
        return self.act(x) if self.flag else self.act(self.conv(x))

    def chosen(self, x):
        if self.flag == "waiting":
            return self.waiting(x)
        return self.further(x)

    def further(self, x):
        return F.relu(x) if self.flag == "further" else x


class Plainly(Helped):
    """Its helper calls what is replaced, from two places, and its ReLU is None."""

    def forward(self, x):
        if self.relu is not None:
            x = self.relu(x)
        if self.flag:
            return self.plain(x - 1)
        return self.plain(x)


class Further(Helped):
    def forward(self, x):
        return self.act(self.further(x))


class Waiting(Helped):
    def forward(self, x):
        return self.act(self.chosen(x))


@pytest.mark.parametrize(
    ("module", "named"), [(Plainly, []), (Further, ["further"]), (Waiting, ["chosen", "further"])]
)
def test_helpers_are_read_for_what_no_pass_runs(module, named):
    net = nn.Sequential(module(), nn.Flatten())
    before = state(net)
    if not named:
        replace_relus(net, "all", Probe)
        assert isinstance(net[0].act, Probe)
        return
    with pytest.raises(SiteError) as error:
        replace_relus(net, "all", Probe)
    found = [
        name for name in ("plain", "chosen", "further") if f"(Helped.{name}) calls ReLU" in str(error.value)
    ]
    assert sorted(found) == sorted(named)
    assert_untouched(net, before)


class ConvAndAct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()


class ByMode(ConvAndAct):
    """Another call in training than in evaluation, which no rewriting of one call covers."""

    def forward(self, x):
        x = self.act(x) if self.training else F.relu(x)
        return self.conv(F.relu(self.conv(x)))


class ByModule(ByMode):
    """The same with two modules, of which each has a name."""

    def __init__(self):
        super().__init__()
        self.other = nn.ReLU()

    def forward(self, x):
        x = self.act(x) if self.training else self.other(x)
        return self.conv(F.relu(self.conv(x)))


@pytest.mark.parametrize("block", [ByMode, ByModule])
def test_one_activation_is_not_trained_and_another_used(block):
    net = nn.Sequential(block(), nn.Flatten())
    before = state(net)
    with pytest.raises(
        SiteError, match="it is called in evaluation mode only, where the module runs in both"
    ):
        replace_relus(net, "all", Probe)
    assert_untouched(net, before)


class Twice(ConvAndAct):
    def forward(self, x):
        for _ in range(2):
            x = self.act(self.conv(x))
        return torch.stack([F.relu(row) for row in x]).relu()


def test_what_all_cannot_reach_is_named_in_one_error():
    net = nn.Sequential(Twice(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Flatten())
    before = state(net)
    with pytest.raises(SiteError) as error:
        replace_relus(net, "all", nn.SiLU)
    text = str(error.value)
    assert "(Twice.forward) calls the ReLU in a loop; write the calls one by one" in text
    assert "all: 0 cannot be replaced: it runs on a map without a batch dimension" in text
    assert text.endswith('6 calls of ReLU on feature maps ("all")\nNothing was changed.')
    assert_untouched(net, before)


def test_a_network_that_more_than_doubles_warns_once():
    net = nets.Net(nets.TwoModules)
    with pytest.warns(
        UserWarning, match=r"with Sparta at 9 sites the network has [\d,]+ parameters, 4\.9 times"
    ):
        replace_relus(net, "all")
    restore_relus(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_relus(net, "stem.2")
        restore_relus(net)
        before = state(net)
        with pytest.raises(
            UserWarning, match=r"lambda channels: Sparta\(channels, hidden=8\), or fewer sites"
        ):
            replace_relus(net, "all")
    assert_untouched(net, before)


class MapAndKernel(nn.Module):
    """A map that is a kernel too, another in which the places of unfolded windows are left, and a kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.a(x))
        seen = F.conv2d(x, x[:1, :, :3, :3], padding=1)
        windows = F.unfold(self.b(x), 3, padding=1).view(*x.shape[:2], 9, *x.shape[2:])
        only = F.conv2d(x, F.relu(self.b(x)[:1, :, :3, :3]))
        return F.relu(windows.mean(2)) + seen.mean() + only.mean()


def test_a_map_that_is_a_kernel_too_is_replaced():
    net = nn.Sequential(MapAndKernel()).eval()
    expected = outputs(net, False, {0, 2})[1]
    replace_relus(net, "all", Probe)
    assert_same(outputs(net, False)[1], expected)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.dense, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 64), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(F.relu(self.dense(self.a(x).mean((2, 3))).view(-1, 4, 4, 4)))


def test_a_map_that_a_dense_layer_makes_is_named():
    with pytest.raises(SiteError, match="it runs on what has the shape of a map, but no places of the input"):
        replace_relus(Decoder(), "all", Probe)


class OwnClass(nn.Module):
    """As timm's GELU: a name that is known, and a forward of its own."""

    class ReLU(nn.Module):
        def forward(self, x):
            return F.relu(x)

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 4, 3), self.ReLU(), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def test_an_activation_of_somebodys_that_has_run_is_no_branch():
    net = OwnClass().eval()
    expected = outputs(net, False, {0})[1]
    replace_relus(net, "all", Probe)
    assert net.act.sparta.sparta_site == "act"
    assert_same(outputs(net, False)[1], expected)


class InTurns(nn.Module):
    """Each of three lists has its own part in a turn, and two lists have no activation."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def forward(self, x):
        for i, (conv, norm, act) in enumerate(zip(self.convs, self.norms, self.acts, strict=True)):
            x = norm(conv(x))
            x = act(x - i)
        return x


def test_each_name_of_a_loop_has_its_own_list():
    net = nn.Sequential(InTurns())
    expected = outputs(net, True, {0, 1})[1]
    replace_relus(net, "all", Probe)
    assert_same(outputs(net, True)[1], expected)


def test_all_twice_is_all():
    net = replace_relus(nets.Net(nets.Functional), ["all", "all"], nn.SiLU)
    assert calls_of(net) == [(0, 1)] * 2


class Choosing(Decoder):
    def forward(self, x):
        if x.ndim == 77:
            x = F.relu(F.relu(x))
        return F.relu(self.a(x))


def test_the_network_itself_is_named_and_each_line_once():
    with pytest.raises(SiteError) as error:
        replace_relus(Choosing(), "all", nn.SiLU)
    assert str(error.value).count("all: the network cannot be replaced: line ") == 1


def test_parameters_that_an_activation_shares_with_the_network_were_there_before():
    net = nets.Net(nets.TwoModules)
    size = sum(p.numel() for p in net.parameters())

    class Borrowing(nn.SiLU):
        def __init__(self):
            super().__init__()
            self.bias = net.layer1[0].conv1.weight

    replace_relus(net, "all", Borrowing)
    assert f"9 replaced: {size:,} parameters before, {size:,} now" in str(relu_sites(net))


def test_an_activation_of_ours_put_by_hand_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Sparta(4, hidden=8), nn.Conv2d(4, 4, 3), nn.ReLU())
    before = state(net)
    with pytest.raises(SiteError, match="1: 1 cannot be replaced: it is one of our activations"):
        replace_relus(net, "1", nn.SiLU)
    assert_untouched(net, before)
    assert str(relu_sites(net)) == (
        "site  name  channels  calls  parameters  edit\n"
        "      3     4         1      +973        swap\n"
        f"      1     4         1      {sum(p.numel() for p in net[1].parameters())}         Sparta\n"
        '1 calls of ReLU on feature maps ("all")'
    )
    replace_relus(net, "all", nn.SiLU)
    assert [type(m).__name__ for m in net] == ["Conv2d", "Sparta", "Conv2d", "SiLU"]
    assert_untouched(restore_relus(net), before)
