"""What a network may call in passes unlike those on the example is refused, in whatever it is hidden."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from sparta_act import replace_relus, restore_relus
from sparta_act.errors import SiteError
from tests.package.test_surgery import Probe, assert_untouched, state


class Parts(nn.Module):
    """What the blocks here have."""

    twice = False

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.first, self.second = lambda x: self.relu(x), lambda x: F.relu(x)

    def sums(self, x):
        return self.conv2(self.conv1(x)) + x

    def tail(self, x):
        x = self.relu(x)
        if self.twice:
            x = F.relu(self.conv1(x))
        return x

    def post(self, x):
        return F.relu(x)


def tail(block, x):
    x = block.relu(x)
    if block.twice:
        x = F.relu(block.conv1(x))
    return x


class Itself(Parts):
    def forward(self, x):
        return self.relu(self.sums(x)) if not self.twice else F.relu(self.relu(self.sums(x)))


class Inherited(Itself):
    def forward(self, x):
        return super().forward(x)


class ByMethod(Parts):
    def forward(self, x):
        return self.tail(self.sums(x))


class ByFunction(Parts):
    def forward(self, x):
        return tail(self, self.sums(x))


class ByBase(Parts):
    def post(self, x):
        return super().post(x) if self.twice else self.relu(x)

    def forward(self, x):
        return self.post(self.sums(x))


class ByLambda(Parts):
    def forward(self, x):
        x = self.first(self.sums(x))
        return self.second(x) if self.twice else x


class Chosen(Parts):
    index = 0

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def forward(self, x):
        return self.acts[self.index](self.sums(x))


class Plain(Parts):
    def tail_alone(self, x):
        return self.relu(self.conv2(x))

    def forward(self, x):
        return self.relu(self.sums(x))


class WrappedAlone(Plain):
    """It says that it is the method of its base, and is not."""

    @functools.wraps(Plain.forward)
    def forward(self, x):
        x = self.relu(self.sums(x))
        return F.relu(x) if self.twice else x


class ByComprehension(Parts):
    """The two calls are on one line."""

    def forward(self, x):
        x = self.sums(x)
        return torch.cat([F.relu(row) for row in x.split(1, 1)], 1) if self.twice else self.relu(x)


class OfAnother(Parts):
    def forward(self, x):
        return ByMethod.tail(self, self.sums(x))


def with_another(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        x = forward(self, x)
        return F.relu(x) if self.twice else x

    return wrapper


class Decorated(Parts):
    @with_another
    def forward(self, x):
        return self.relu(self.sums(x))


class Recursive(Parts):
    """A helper that calls itself; the call that no pass runs is in the last turn."""

    def turn(self, x, depth):
        if depth:
            return self.turn(self.relu(self.conv1(x)), depth - 1)
        return F.relu(x) if self.twice else self.relu(x)

    def forward(self, x):
        return self.turn(self.sums(x), 0)


class OverCall(Plain):
    def __call__(self, x):
        x = super().__call__(x)
        return F.relu(x) if self.twice else x


@pytest.mark.parametrize("sites", ["G1.B1", "all"])
@pytest.mark.parametrize(
    "block",
    [
        Inherited,
        ByMethod,
        ByFunction,
        ByBase,
        ByLambda,
        ByComprehension,
        OfAnother,
        Decorated,
        Recursive,
        Chosen,
        WrappedAlone,
        OverCall,
    ],
)
def test_a_last_call_that_no_pass_runs_is_found(block, sites):
    net = nn.Sequential(nn.Sequential(block(), block()))
    before = state(net)
    with pytest.raises(SiteError, match=r"calls ReLU (too, which may be the last|in a branch that no pass)"):
        replace_relus(net, sites, nn.SiLU)
    assert_untouched(net, before)


class Earlier(Parts):
    """The call of its helper that no pass runs is never the last."""

    def tail(self, x):
        if self.twice:
            x = F.relu(self.conv1(x))
        return self.relu(x)

    def forward(self, x):
        return self.tail(self.sums(x))


def test_a_call_before_the_last_one_of_a_helper_is_no_last_call():
    net = replace_relus(nn.Sequential(nn.Sequential(Earlier(), Earlier())), "G1.B*", Probe)
    assert isinstance(net[0][0].relu, Probe)
    net = nn.Sequential(Earlier())
    with pytest.raises(SiteError, match=r"\(Earlier.tail\) calls ReLU in a branch that no pass"):
        replace_relus(net, "all", Probe)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for name in "ab"})

    def forward(self, x, name="a"):
        return self.heads[name](x)


class Encoder(Parts):
    """Its method is called from outside: it has no forward."""

    def encode(self, x, twice):
        x = self.relu(self.conv1(x))
        return F.relu(self.conv2(x)) if twice else x


class Calling(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x, twice=False):
        return self.encoder.encode(x, twice)


class InTwoContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
        self.part = self.whole[:2]

    def forward(self, x, partly=False):
        return self.part(x) if partly else self.whole(x)


@pytest.mark.parametrize("make", [Heads, Calling, InTwoContainers])
def test_all_would_not_reach_what_another_argument_calls(make):
    net = nn.Sequential(make())
    before = state(net)
    with pytest.raises(SiteError, match="calls ReLU in a branch that no pass on the example runs"):
        replace_relus(net, "all", nn.SiLU)
    assert_untouched(net, before)


class OneByOne(nn.Module):
    """What no pass calls as a whole has run, one by one."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))

    def forward(self, x, at_once=False):
        if at_once:
            return self.whole(x)
        for layer in self.whole:
            x = layer(x)
        return x


def test_a_chain_that_ran_layer_by_layer_has_run():
    net = replace_relus(nn.Sequential(OneByOne()), "all", Probe)
    assert isinstance(net[0].whole[1], Probe)


def run(layer, x):
    return layer(x)


class EitherWay(nn.ModuleDict):
    """As timm's networks of features: a way that no pass takes calls what another way has called."""

    checkpointed = False

    def __init__(self):
        super().__init__({"conv": nn.Conv2d(3, 3, 3), "act": nn.ReLU(), "last": nn.Conv2d(3, 3, 3)})

    def collected(self, x):
        for i, layer in enumerate(self.values()):
            x = run(layer, x) if self.checkpointed and i else layer(x)
        return x

    def forward(self, x):
        return self.collected(x)


def test_a_way_that_calls_what_is_replaced_is_no_reason_to_refuse():
    net = replace_relus(nn.Sequential(EitherWay()), "all", Probe)
    assert isinstance(net[0]["act"], Probe)


class Hourglass(Parts):
    """Its helper calls itself, and a network beside it never runs."""

    def __init__(self):
        super().__init__()
        self.teacher = Earlier()

    def turn(self, x, depth):
        x = self.conv1(x)
        return self.turn(x, depth - 1) if depth else self.relu(x)

    def forward(self, x):
        return self.turn(x, 2)


def in_half(forward):
    @functools.wraps(forward)
    def wrapper(*args):
        if not args[0].twice:
            return forward(*args)
        return forward(*[a.half() for a in args])

    return wrapper


class TwoWays(Parts):
    """Two ways of a helper, and of a decorator as in mmcv, end in one call."""

    def ways(self, x):
        if self.twice:
            return self.tail_alone(self.conv1(x))
        return self.tail_alone(x)

    def tail_alone(self, x):
        return self.relu(self.conv2(x) + x)

    @in_half
    def forward(self, x):
        return self.ways(x)


def test_two_ways_that_end_in_one_call():
    net = replace_relus(nn.Sequential(nn.Sequential(TwoWays(), TwoWays())), "G1.B*", Probe)
    assert isinstance(net[0][1].relu, Probe)


class Calls(Parts):
    """It calls a method of another module."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.conv1(self.inner.tail_alone(x))


def test_a_helper_that_calls_itself_and_a_module_that_never_runs():
    net = replace_relus(nn.Sequential(Hourglass()), "all", Probe)
    assert isinstance(net[0].relu, Probe)


def test_a_method_of_another_module_is_read_as_that_ones():
    net = replace_relus(nn.Sequential(Calls()), "all", Probe)
    assert isinstance(net[0].inner.relu, Probe)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def test_a_traced_chain_is_replaced_and_a_copy_that_forgot_is_not_restored():
    net = replace_relus(nn.Sequential(fx.symbolic_trace(Layers())), "all", Probe)
    assert [isinstance(m, Probe) for m in net[0].get_submodule("layers").children()] == [False, True] * 2
    net = replace_relus(nn.Sequential(fx.symbolic_trace(Plain())), "all", Probe)
    twin = copy.deepcopy(net)
    with pytest.raises(SiteError, match=r"a copy of a torch.*, which has lost what was at relu"):
        restore_relus(twin)
    assert isinstance(restore_relus(net)[0].relu, nn.ReLU)


class Delegating(nn.Module):
    """It gives most attributes to what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.add_module("inner", inner)

    def __setattr__(self, name, value):
        inner = vars(self).get("_modules", {}).get("inner", object)
        setattr(inner, name, value) if hasattr(inner, name) else super().__setattr__(name, value)

    def forward(self, x):
        return F.relu(self.inner(x))


def test_a_class_is_changed_past_a_setattr_of_the_modules_own():
    net = nn.Sequential(Delegating(nn.Conv2d(3, 3, 3)))
    replace_relus(net, "all", Probe)
    assert type(net[0].inner) is nn.Conv2d
    net(torch.rand(1, 3, 8, 8))
    assert type(restore_relus(net)[0]) is Delegating


class AnyAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def __getattr__(self, name):
        return vars(self)["_modules"].get(name)

    def forward(self, x):
        return F.relu(self.conv(F.relu(self.conv(x))))


def test_attributes_that_a_module_makes_up_are_not_there():
    net = replace_relus(nn.Sequential(AnyAttribute()), "all", Probe)
    assert [*net[0]._modules] == ["conv", "sparta", "sparta_1"]
