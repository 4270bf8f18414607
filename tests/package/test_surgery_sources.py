"""What only the source of a forward tells: calls that never ran, two that both run, and which source runs."""

import __future__

import functools
import importlib
import itertools
import linecache
import os
import random
import sys
import types

import pytest
import torch
from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus
from tests.helpers.nets import conv3
from tests.package.test_surgery import Probe, assert_same, assert_untouched, state

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

BLOCK = """
import functools
import operator
import torch
import torch.nn.functional as F
from functools import partial
from torch import nn
from torch.nn.functional import relu as imported

rectify = partial(F.relu, inplace=False)


TABLE = {{"act": F.relu, "other": F.elu}}
CLASSES = [nn.ELU, nn.ReLU]
alias = torch.relu


def decide(x):
    return F.relu(x)


def pick(name):
    return TABLE[name]


def build(number):
    return CLASSES[number]()


def tabled(x):
    return TABLE["act"](x)


def aliased(x):
    return alias(x)


def given(x, act=F.relu):
    return act(x)


def closed(act):
    return lambda x: act(x)


class Callable:
    def __init__(self, act):
        self.inner = act

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # as a configuration does

    def __call__(self, x):
        return self.inner(x)


rectified, eluted = closed(F.relu), closed(F.elu)

class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.relu(self.a(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.flag = nn.Conv2d(4, 4, 1), nn.ReLU(), False

    def forward(self, x):
        h = self.a(x)
        return self.act(h) if self.flag else h


class Parent(nn.Module):
    def parental(self, x):
        return F.relu(x)

    def silent(self, x):
        return x + 1


class Block(Parent):
    kept = torch.relu

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu, self.act, self.elu, self.none = nn.ReLU(), nn.ReLU(), nn.ELU(), nn.Identity()
        self.__relu = nn.ReLU()
        self.f, self.part, self.bound = F.relu, partial(F.relu), self.relu.forward
        self.lamb, self.name = lambda x: F.relu(x), "relu"
        self.acts, self.seq = nn.ModuleList([nn.ELU(), nn.ReLU()]), nn.Sequential(nn.ELU(), nn.ReLU())
        self.named, self.plain, self.map = nn.ModuleDict({{"a": nn.ReLU()}}), [torch.relu], {{"a": nn.ReLU()}}
        self.flag, self.which, self.cfg = False, 1, type("C", (), {{"act": nn.ReLU()}})()
        self.extra = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.stage, self.norm, self.gated = Stage(), nn.BatchNorm2d(4), Gated()
        self.object, self.elu_object = Callable(F.relu), Callable(F.elu)
        self.partly, self.elu_partly = partial(decide), partial(F.elu, alpha=2.0)
        self.elus = nn.ModuleList([nn.ELU(), nn.Identity()])

    @property
    def lazy(self):
        raise RuntimeError("nobody may ask for this")

    def helper(self, x):
        return self.relu(x)

    def by_attribute(self, x):
        return self.f(x)

    def by_part(self, x):
        return self.extra(x)

    def by_property(self, x):
        return self.activation(x)

    @property
    def activation(self):
        return self.act

    def no_relu(self, x):
        return self.norm(self.elu(self.b(x)))

    def forward(self, x{arguments}):
        h = self.{last}(self.a(x) + x)
{steps}
        return h
"""

numbered = itertools.count()


@pytest.fixture
def net_of(tmp_path, monkeypatch):
    """A network of two blocks with these lines in their forward, after the last call that runs."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(steps, last="act", arguments="", template=BLOCK):
        name = f"sources{next(numbered)}"
        indented = "\n".join(" " * 8 + line for line in steps.splitlines())
        (tmp_path / f"{name}.py").write_text(
            template.format(steps=indented, last=last, arguments=arguments) if template == BLOCK else steps
        )
        module = __import__(name)
        return nn.Sequential(conv3(3, 4), nn.Sequential(module.Block(), module.Block()))

    return make


def refused(net, problem):
    before = state(net)
    with pytest.raises(SiteError, match=problem) as error:
        replace_relus(net, "G1.B1", Probe, example=IMAGES)
    assert_untouched(net, before)
    return str(error.value)


# ways to call a ReLU
CALLS = """
self.relu({x})
self.f({x})
self.part({x})
self.bound({x})
self.lamb({x})
self.kept({x})
self.__relu({x})
self._Block__relu({x})
self.acts[1]({x})
self.acts[-1]({x})
self.acts[self.which]({x})
self.seq[1]({x})
self.named["a"]({x})
self.plain[0]({x})
self.map["a"]({x})
self.cfg.act({x})
self.relu.forward({x})
self.relu.__call__({x})
getattr(self, "relu")({x})
getattr(F, "relu")({x})
getattr(F, self.name)({x})
getattr(self, self.name)({x})
vars(self)["f"]({x})
self.__dict__["f"]({x})
self._modules["relu"]({x})
operator.methodcaller("relu")({x})
nn.functional.relu({x})
torch.nn.functional.relu({x})
torch.relu({x})
torch.ops.aten.relu({x})
torch.ops.aten.relu.default({x})
({x}).relu()
nn.ReLU()({x})
nn.ReLU(inplace=True)({x})
imported({x})
rectify({x})
decide({x})
partial(F.relu)({x})
self.helper({x})
(self.relu if self.flag else self.elu)({x})
(self.elu or self.relu)({x})
(lambda t: F.relu(t))({x})
(lambda t: self.acts[1](t))({x})
[F.relu(t) for t in ({x},)][0]
[act({x}) for act in (self.relu,)][0]
{{"a": F.relu}}["a"]({x})
(r := self.relu)({x})
next(map(F.relu, [{x}]))
(lambda t, f=self.relu: f(t))({x})
nn.ReLU.forward(self.relu, {x})
apply(self.relu, {x})
{{True: F.relu, False: torch.tanh}}[self.flag]({x})
self.extra({x})
self.stage({x})
pick("act")({x})
build(1)({x})
tabled({x})
aliased({x})
given({x})
rectified({x})
closed(F.relu)({x})
self.object({x})
Callable(self.relu)({x})
self.partly({x})
self.by_attribute({x})
self.by_part({x})
self.by_property({x})
super().parental({x})
super(Block, self).parental({x})
type(self).helper(self, {x})
self.__class__.helper(self, {x})
functools.reduce(lambda a, f: f(a), self.acts, {x})
apply(self.stage, {x})
getattr({x}, "relu")()
(*self.acts,)[1]({x})
next(iter(self.named.values()))({x})
self.acts.pop(1)({x})
self.map.get("a")({x})
self.get_submodule("act")({x})
operator.attrgetter("act")(self)({x})
operator.itemgetter(1)(self.acts)({x})
self.act.__class__()({x})
type(self.act)()({x})
nn.Sequential(nn.ReLU(), nn.Identity())({x})
nn.Sequential(*self.acts)({x})
(self.plain + [F.elu])[0]({x})
""".strip().splitlines()
ALIASES = """
act = self.relu
act = F.relu
act, _ = self.relu, None
_, act = self.acts
act: object = F.relu
from torch.nn.functional import relu as act
import torch.nn.functional as G; act = G.relu
act = self.acts[1] if self.flag else self.elu
act = lambda t: F.relu(t)
act = {"a": lambda t: F.relu(t)}["a"]
act = partial(F.relu)
act = getattr(self, "relu")
act = inner = self.act
act = pick("act")
act = self.acts.pop(1)
act = Callable(F.relu)
def act(t): return F.relu(t)
def act(t): return (lambda u: self.relu(u))(t)
""".strip().splitlines()
OTHERS = """
self.elu({x})
self.none({x})
self.acts[0]({x})
self.seq[0]({x})
self.lazy({x})
self.unknown({x})
F.elu({x})
torch.sigmoid({x})
self.norm({x})
self.a({x})
F.relu6({x})
getattr(self, "elu")({x})
(lambda t: F.elu(t))({x})
eluted({x})
self.elu_object({x})
self.elu_partly({x})
self.no_relu({x})
super().silent({x})
type(self).no_relu(self, {x})
functools.reduce(lambda a, f: f(a), self.elus, {x})
apply(self.norm, {x})
getattr({x}, "exp")()
({x}).mean(0).exp()
self.elus.pop(0)({x})
operator.attrgetter("elu")(self)({x})
nn.Sequential(nn.ELU())({x})
nn.Sequential(*self.elus)({x})
""".strip().splitlines()


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_a_relu_in_a_branch_is_known(net_of, call):
    way = call.format(x="self.b(h)")
    refused(
        net_of(f"if x.shape[-1] > 99: h = {way}"), r"line \d+ \(Block\.forward\) calls (ReLU|a module with)"
    )


@pytest.mark.parametrize("choice", ["F.relu if self.flag else torch.tanh", "(torch.tanh, F.relu)[self.flag]"])
def test_what_has_run_as_another_function_may_be_a_relu(net_of, choice):
    refused(net_of(f"f = {choice}\nh = f(h)"), "calls ReLU too")


def test_a_module_that_is_given_away_before_is_replaced_at_its_last_call_alone(net_of):
    net = net_of("if x.shape[-1] > 99: h = apply(self.act, h)\nh = self.act(h)")
    site = relu_sites(net, example=IMAGES)[1]
    assert (site.label, site.edit) == ("G1.B2", "rewrite")


def test_a_module_that_runs_without_its_relu_has_run(net_of):
    steps = "h = F.relu(h + x)\nh = h * torch.sigmoid(self.gated(h))"
    assert isinstance(
        replace_relus(net_of(steps, last="none"), "G1.B1", Probe, example=IMAGES)[1][0].sparta, Probe
    )


def test_either_branch_may_call_the_part_with_the_last_relu(net_of):
    steps = "return x + self.stage(x) if self.which else self.stage(x)"
    net = replace_relus(net_of(steps, last="none"), "G1.B1", Probe, example=IMAGES)
    assert isinstance(net[1][0].stage.sparta, Probe)


def test_a_part_that_a_call_of_the_replaced_module_follows_is_not_last(net_of):
    steps = "if self.flag: return self.act(self.extra(h))\nreturn self.act(self.extra(h) + x)"
    assert isinstance(
        replace_relus(net_of(steps, last="none"), "G1.B1", Probe, example=IMAGES)[1][0].act, Probe
    )


AGAIN = [
    "self.helper",
    "decide",
    "self.extra",
    "self.stage",
    "self.object",
    "self.by_part",
    "super().parental",
]


@pytest.mark.parametrize("call", AGAIN)
def test_what_has_run_before_may_come_last_where_it_never_ran(net_of, call):
    before = f"x = {call}(x)\nif self.flag: x = {call}(x)\nh = F.relu(h + x)\n"
    refused(net_of(f"{before}if self.flag: h = {call}(h)", last="none"), r"calls (ReLU|a module with)")
    net = net_of(f"{before}h = self.no_relu(self.elu(h))", last="none")
    assert isinstance(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0].sparta, Probe)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_known(net_of, alias):
    refused(net_of(f"{alias}\nif x.shape[-1] > 99: h = act(self.b(h))"), "calls ReLU too")


@pytest.mark.parametrize("call", OTHERS)
def test_what_is_no_relu_may_come_last(net_of, call):
    net = net_of(f"if x.shape[-1] > 99: h = {call.format(x='self.b(h)')}")
    assert [s.edit for s in relu_sites(net, example=IMAGES) if s.label] == ["swap", "swap"]


# places of a call that no pass takes, and whether it may come last there
PLACES = [
    ("return {call} if x.shape[-1] > 99 else h", True),
    ("h = h if x.shape[-1] < 99 else {call}", True),
    ("if x.shape[-1] > 99: return {call}", True),
    ("match x.shape[-1]:\n    case 999: h = {call}", True),
    ("match x.shape[-1]:\n    case 998: h = h + 1\n    case 999: h = {call}\n    case _: h = h + 0", True),
    ("try: self.a(h)\nexcept ValueError: h = {call}", True),
    ("try: h = h * 1\nexcept ValueError: raise\nelse: h = h if self.which else {call}", True),
    ("try: h = h * 1\nfinally: h = h if self.which else {call}", True),
    ("while self.flag: h = {call}; break", True),
    ("for _ in range(self.flag): h = {call}", True),
    ("if self.flag and (h := {call}) is not None: pass", True),
    ("with torch.no_grad():\n    if self.flag: h = {call}", True),
    ("assert self.which or {call} is not None", True),
    ("if self.flag:\n    h = {call}\n    return h", True),
    ("if self.flag:\n    if self.which: return {call}\n    raise ValueError", True),
    ("if self.flag:\n    try: h = {call}; raise ValueError\n    except ValueError: pass", True),
    ("try:\n    if self.flag: h = {call}; raise ValueError\nexcept ValueError: pass", True),
    ("if self.flag: {call}; raise ValueError", False),
    ("if self.flag: raise ValueError({call}.max())", False),
    ("if self.flag:\n    h = {call}\n    if h.max() > 1: h = h - 1\n    raise ValueError", False),
    ("if self.flag:\n    if self.which: h = {call}\n    raise ValueError", False),
    ("assert self.which, {call}", False),
    ("return h\nh = {call}", False),
    ("if False: h = {call}", False),
    ("def unused(t): return {call}", False),
]


@pytest.mark.parametrize(("place", "last"), PLACES)
def test_a_call_counts_where_it_may_come_last(net_of, place, last):
    net = net_of(place.format(call="self.f(self.b(h))"))
    if last:
        refused(net, "calls ReLU too, which may be the last call")
    else:
        assert replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0].act.__class__ is Probe


BEFORE = [
    ("if self.flag: x = {call}", False),
    ("x = {call} if self.flag else x", False),
    ("if self.flag: return {call}", True),
    ("if self.flag: return x\nelif self.b is None: x = {call}", False),
    ("if self.flag:\n    x = {call}\n    if self.which: return x", True),
    ("match self.which:\n    case 7: x = {call}", False),
    ("for i in range(self.flag):\n    if i: x = {call}\n    else: return x", True),
    ("if self.flag:\n    def inner(t): return {call}\n    x = inner(x)", False),
    ("act = lambda t: F.relu(t)\nif self.flag: return act(x)", True),
]


@pytest.mark.parametrize(("place", "last"), BEFORE)
def test_a_call_before_the_last_one_is_harmless_unless_it_returns(net_of, place, last):
    place = place.format(call="self.relu(self.b(x))")
    net = net_of("\n".join([*place.splitlines(), "h = F.relu(self.b(x) + h)"]), last="none")
    if last:
        refused(net, "calls ReLU too")
    else:
        assert isinstance(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0].sparta, Probe)


# after a call that never ran: several ways to the last one, and whether a way without one is left
AFTER = [
    ("if self.training: h = F.relu(h)\nelse: h = torch.relu(h)", False),
    ("h = F.relu(h) if self.training else torch.relu(h)", False),
    ("if self.training: return F.relu(h)\nreturn torch.relu(h)", False),
    ("if self.training:\n    h = F.relu(h)\n    return h\nh = torch.relu(h)", False),
    (
        "if self.which:\n    if self.training: h = F.relu(h)\n    else: h = torch.relu(h)\nelse: h = h + 1",
        True,
    ),
    ("if self.training: h = F.relu(h)\nelif self.flag: h = h + 1\nelse: h = torch.relu(h)", True),
    ("if self.training: h = F.relu(h)\nelse:\n    if self.flag: return h\n    h = torch.relu(h)", True),
    (
        "match self.training:\n    case True: h = F.relu(h)\n    case False: h = h.relu()\n    case _: pass",
        True,
    ),
    ("if self.flag: return x\nif self.training: h = F.relu(h)\nelse: h = torch.relu(h)", True),
    ("if self.training: return F.relu(h)\nif self.flag: return h\nreturn torch.relu(h)", True),
    (
        "if self.training: h = F.relu(h)\nif self.flag: return h\nif not self.training: h = torch.relu(h)",
        True,
    ),
]


@pytest.mark.parametrize(("ways", "left"), AFTER)
def test_a_call_is_harmless_before_several_ways_to_the_last_one(net_of, ways, left):
    net = net_of(f"if self.flag: x = F.relu(self.b(x))\n{ways}", last="none")
    if left:
        refused(net, "calls ReLU too, which may be the last call")
        return
    replace_relus(net, "G1.B1", Probe, example=IMAGES)
    net[1][0].flag, calls = True, []
    net[1][0].sparta.register_forward_hook(lambda *_: calls.append(1))
    for training in (False, True):
        net.train(training)(IMAGES)
    assert calls == [1, 1]


def test_the_way_out_for_two_ends_of_which_one_never_ran(net_of):
    ends = "if self.flag: return {0}(h)\nreturn {0}(h)"
    text = refused(net_of(ends.format("F.relu"), last="none"), "calls ReLU too, which may be the last call")
    assert "one nn.ReLU of the module's own, self.relu(x), in each" in text
    net = replace_relus(net_of(ends.format("self.relu"), last="none"), "G1.B1", Probe, example=IMAGES)
    assert isinstance(net[1][0].relu, Probe)


@pytest.mark.parametrize(("last", "call"), [("f", "self.f"), ("act", "self.act"), ("pick()", "self.pick()")])
def test_the_callee_that_was_seen_is_known(net_of, last, call):
    steps = f"h = h if x.shape[-1] < 99 else {call}(self.b(h))"
    template = BLOCK.replace(
        "    def helper", "    def pick(self):\n        return self.relu\n\n    def helper"
    )
    net = net_of(template.format(steps=" " * 8 + steps, last=last, arguments=""), template="")
    refused(net, "calls ReLU too" if last != "act" else "line .* calls ReLU too")


MADE = """
import torch.nn.functional as F
from torch import nn


def make(go):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            h = F.relu(self.a(x) + x)
            return h if x.shape[-1] < 99 else go(h)

    return Block


Block = make({})
"""


def test_defaults_and_closures(net_of):
    steps = "if x.shape[-1] > 99: h = go(self.b(h))"
    refused(net_of(steps, arguments=", go=F.relu"), "calls ReLU too")
    refused(net_of(steps, arguments=", *, go=imported"), "calls ReLU too")
    assert relu_sites(net_of(steps, arguments=", go=None"), example=IMAGES)[0].edit == "swap"
    refused(net_of(MADE.format("nn.ReLU()"), template=""), "calls ReLU too")
    assert relu_sites(net_of(MADE.format("nn.ELU()"), template=""), example=IMAGES)[0].edit == "rewrite"


# two ways to the last call, and whether one pass may run both
WAYS = [
    ("if self.training: return F.relu(h)\nelse: return torch.relu(h)", False),
    ("if self.training: h = F.relu(h)\nelse: h = torch.relu(h)", False),
    ("if self.training: return F.relu(h)\nh = torch.relu(h)", False),
    ("if self.training:\n    h = F.relu(h)\n    return h\nh = torch.relu(h)", False),
    ("if self.training:\n    if self.flag: return h\n    return F.relu(h)\nh = torch.relu(h)", False),
    ("h = F.relu(h) if self.training else torch.relu(h)", False),
    ("match self.training:\n    case True: h = F.relu(h)\n    case _: h = torch.relu(h)", False),
    ("try:\n    if self.training: return F.relu(h)\nfinally: h = h * 1\nh = torch.relu(h)", False),
    ("h = F.relu(h)\nif not self.training: h = torch.relu(h)", True),
    ("if self.training: h = F.relu(h)\nif not self.training: h = torch.relu(h)", True),
    ("if self.training:\n    h = F.relu(h)\n    if self.which: return h\nh = torch.relu(h)", True),
    ("if self.training:\n    try: return F.relu(h)\n    finally: pass\nh = torch.relu(h)", False),
    (
        "try:\n    h = F.relu(h)\n    if not self.training: raise KeyError\n"
        "except KeyError: h = torch.relu(h)",
        True,
    ),
    (
        "try:\n    if self.training: h = F.relu(h); raise KeyError\n"
        "except KeyError: return h\nh = torch.relu(h)",
        True,
    ),
]


@pytest.mark.parametrize(("ways", "both"), WAYS)
def test_two_last_calls_must_exclude_each_other(net_of, ways, both):
    net = net_of(ways, last="none")
    if both:
        refused(net, "and one pass may run both; write if and else|ran: G1.B1: 2 times")
        return
    replace_relus(net, "G1.B1", Probe, example=IMAGES)
    calls = []
    net[1][0].sparta.register_forward_hook(lambda *_: calls.append(1))
    for training in (False, True):
        calls.clear()
        net.train(training)(IMAGES)
        assert calls == [1]


LEAVES = """
import random
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        h = {call}(self.a(x)) + x
        if self.training and random.random() < 0.3:
            return {call}(h - 0.1)
        return h
"""


@pytest.mark.parametrize("call", ["F.relu", "self.act"])
def test_a_second_call_by_chance_is_never_run_together_with_the_first(net_of, call):
    for seed in range(4):
        random.seed(seed)
        refused(net_of(LEAVES.format(call=call), template=""), "one pass may run both|2 times|calls ReLU too")


def test_one_module_at_two_places_is_rewritten_at_the_last(net_of):
    net = net_of("h = self.a(h)\nif self.flag: h = self.act(h)\nh = self.act(h)", last="none")
    assert replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0].act.__class__ is nn.ReLU
    net[1][0].flag = True
    calls = []
    net[1][0].sparta.register_forward_hook(lambda *_: calls.append(1))
    net(IMAGES)
    assert calls == [1]


HELPED = """
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act1, self.act2, self.flag = nn.ReLU(), nn.ReLU(), False

    def one(self, x):
        return self.act1(self.a(x))

    def saved(self, x):
        def closure(x):
            return self.one(x)
        return checkpoint(closure, x, use_reentrant=False)

    def other(self, x):
        return F.relu(self.one(x))

    def forward(self, x):
{steps}
        return x + self.b(self.act2(h))
"""


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("if self.flag: h = self.saved(x)\nelse: h = self.one(x)", ""),
        ("h = self.saved(x) if self.flag else self.one(x)", ""),
        ("h = self.one(x)\nif self.flag: h = self.saved(h)", "is called in one"),
        ("if self.flag: h = self.other(x)\nelse: h = self.one(x)", "calls ReLU too"),
    ],
)
def test_a_helper_that_calls_the_replaced_child_alone_is_no_other_call(net_of, steps, problem):
    """As in DenseNet: one of two ways saves memory."""
    indented = "\n".join(" " * 8 + line for line in steps.splitlines())
    net = net_of(HELPED.format(steps=indented), template="")
    if problem:
        assert "1.0.act1" not in [s.name for s in relu_sites(net, example=IMAGES)]
        with pytest.raises(SiteError):
            replace_relus(net, "1.0.act1", Probe, example=IMAGES)
        return
    replace_relus(net, "1.0.act1", Probe, example=IMAGES)
    net.train()[1][0].flag, calls = True, []
    net[1][0].act1.register_forward_hook(lambda *_: calls.append(1))
    net(IMAGES)
    assert calls == [1]


def test_a_branch_around_the_part_with_the_last_call(net_of):
    part = "h = self.seq(self.a(h))"
    for steps in (f"{part}\nif self.flag: h = F.relu(h)", f"{part}\nif self.flag: h = self.extra(h)"):
        refused(net_of(steps, last="none"), "calls ReLU too|a module with ReLU in it, which no pass")
    for steps in (f"if self.flag: h = F.relu(h)\n{part}", f"if self.flag: h = self.extra(h)\n{part}", part):
        assert relu_sites(net_of(steps, last="none"), example=IMAGES)[0].name == "1.0.seq.1"
    loop = "if self.flag: h = F.relu(h)\nfor layer in self.seq:\n    h = layer(h)"
    assert relu_sites(net_of(loop, last="none"), example=IMAGES)[0].name == "1.0.seq.1"
    refused(net_of(loop + "\n    h = F.relu(h) if self.flag else h", last="none"), "calls ReLU too")


OWN = """
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x, scale=1.0):
        if x.shape[-1] > 99: x = x * 0.5
        return F.relu(self.a(x) + x) * scale
"""


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "change", [("0.5", "0.25"), ("scale=1.0", "scale=3.0"), ("self.a(x) + x", "x - self.a(x)")]
)
def test_a_function_with_new_code_is_read_again(net_of, change, told):
    """As IPython's autoreload and its like do it: the same function object, with the code of the new file."""
    net = net_of(OWN, template="")
    module = sys.modules[type(net[1][0]).__module__]
    replace_relus(net, "G1.B1", Probe, example=IMAGES)
    forward, text = module.Block.forward, OWN.replace(*change)
    with open(module.__file__, "w") as file:
        file.write(text)
    os.utime(module.__file__, (1, 1))
    importlib.reload(module)
    if told:
        linecache.checkcache()
    forward.__code__, forward.__defaults__ = module.Block.forward.__code__, module.Block.forward.__defaults__
    x = torch.rand(1, 3, 128, 128)
    expected = net[1][1](net[0](x))
    replace_relus(net, "G1.B2", lambda channels: nn.ReLU(), example=IMAGES)
    assert_same(net[1][1](net[0](x)), expected)
    refused(net, "replaced already")


def test_equal_code_in_two_files(net_of):
    commented = OWN.replace("F.relu(self.a(x) + x)", "F.relu( self.a(x) + x )")
    for text in (OWN, commented):
        net = net_of(text, template="")
        expected = torch.relu(net[1][0].a(net[0](IMAGES)) + net[0](IMAGES)) * 0.5 + 0.1
        assert_same(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0](net[0](IMAGES)), expected)


WRITTEN = {  # how a forward is written; how its site is edited, or why it is not
    "forward = lambda self, x: CALL": "rewrite",
    "forward = (\n        lambda self, x:\n        CALL\n    )": "rewrite",
    "forward, other = lambda self, x: CALL, lambda self, x: x": "holds 2 functions called <lambda>",
    "forward = outside": "rewrite",
    "forward = functools.partialmethod(outside, k=2)": "outside .*; write the call into that",
    "forward = functools.partialmethod(outside)": "called in outside",
    "@no_grad()\n    def forward(self, x): return CALL": "rewrite",
    "@ignore\n    def forward(self, x): return CALL": "rewrite",
    "@plain\n    def forward(self, x): return CALL": "called in forward",
    "COMPILE\n    def forward(self, x): return CALL": "rewrite",
    "@no_grad()\n    COMPILE\n    def forward(self, x): return CALL": "rewrite",
    "COMPILE\n    @no_grad()\n    def forward(self, x): return CALL": "rewrite",
    "@torch.compiler.disable\n    def forward(self, x): return CALL": "rewrite",
    "def forward(*args): return F.relu(args[0].a(args[1]) + args[1])": "has no argument self",
    "def forward(self, x):\n        a, self = self.a, 0\n        return F.relu(a(x) + x)": "another value",
    "def forward(this, x): return F.relu(this.a(x) + x)": "rewrite",
    "def forward(self, x): return self._forward(x)\n    def _forward(self, x): return CALL":
        "called in _forward",
    "def forward(self, x): return [F.relu(y) for y in (self.a(x) + x,)][0]": "loop|<listcomp>",
    "exec('def forward(self, x): return CALL')": "not available; write the class",
    "forward = eval('lambda self, x: CALL')": "source of <lambda> is not available",
}  # fmt: skip
HEAD = """
import functools, torch
import torch.nn.functional as F
from torch import nn, no_grad
from torch.jit import ignore


def outside(self, x, k=1): return F.relu(self.a(x) + x) * k


def plain(f):
    def wrapper(*args): return f(*args)
    return wrapper


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)

    {}
"""


@pytest.mark.parametrize(
    "written", [pytest.param(w, marks=pytest.mark.slow) if "COMP" in w else w for w in WRITTEN]
)
def test_how_a_forward_may_be_written(net_of, written):
    text = written.replace("CALL", "F.relu(self.a(x) + x)").replace(
        "COMPILE", "@torch.compile(backend='eager')"
    )
    net = net_of(HEAD.format(text), template="")
    x = net[0](IMAGES)
    if WRITTEN[written] != "rewrite":
        refused(net, WRITTEN[written])
        return
    expected = torch.relu(net[1][0].a(x) + x) * 0.5 + 0.1
    torch.testing.assert_close(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0](x), expected)


ANNOTATIONS = __future__.annotations.compiler_flag


def test_a_cell_of_a_notebook():
    """The source is in linecache alone; the cell awaits, and an earlier one has imported annotations."""
    cells = []
    for number, factor in enumerate((1.0, 2.0)):
        text = (
            HEAD.format("def forward(self, x: Tensor): return F.relu(self.a(x) + x)") + "\nawait nothing()\n"
        )
        text = text.replace(" + x)", f" * {factor} + x)")
        name, scope = f"<ipython-input-{number}-abc>", {"__name__": "__main__"}
        linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
        classes = text.replace("\nawait nothing()\n", "\n")
        exec(compile(classes, name, "exec", ANNOTATIONS), scope)
        cells.append(scope["Block"])
    for block, factor in zip(cells, (1.0, 2.0), strict=True):  # of one name
        net = nn.Sequential(conv3(3, 4), nn.Sequential(block(), block()))
        x = net[0](IMAGES)
        expected = torch.relu(net[1][0].a(x) * factor + x) * 0.5 + 0.1
        torch.testing.assert_close(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0](x), expected)


class Wrapping:
    """Ways in which tools put a forward on a module."""

    def wraps(self, module):
        module.forward = functools.wraps(module.forward)(lambda *a, own=module.forward: own(*a))

    def method(self, module):
        module.forward = types.MethodType(type(module).forward, module)

    def compiled(self, module):
        module.forward = torch.compile(module.forward, backend="eager")

    def accelerated(self, module):
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(module, hooks.ModelHook())


@pytest.mark.parametrize(
    "way", ["wraps", "method", pytest.param("compiled", marks=pytest.mark.slow), "accelerated"]
)
def test_a_forward_on_the_instance_is_named(net_of, way):
    net = net_of(OWN, template="")
    getattr(Wrapping(), way)(net[1][0])
    problem = relu_sites(net, example=IMAGES)[0].problem
    assert problem.startswith("the module has a forward of its own, which hides that of its class; undo")
    refused(net, "forward of its own")
    if way == "accelerated":
        importlib.import_module("accelerate.hooks").remove_hook_from_module(net, recurse=True)
    for m in net.modules():
        vars(m).pop("forward", None)
    replace_relus(net, "G1.B1", Probe, example=IMAGES)


def test_a_forward_on_the_relu_itself_is_not_lost(net_of):
    net = net_of("")
    Wrapping().wraps(net[1][0].act)
    refused(net, "has a forward of its own")
    Wrapping().wraps(net[1][1])  # the block around a swap may have one
    assert relu_sites(net, example=IMAGES)[1].edit == "swap"


CONTAINERS = {
    "Sequential": ("return F.relu(super().forward(x) + x)", "goes over"),
    "Sequential ": ("return F.relu(nn.Sequential.forward(self, x) + x)", "goes over"),
    "Sequential  ": ("return F.relu(self[0](x) + self.last(x))", "rewrite"),
    "Sequential   ": ("return F.relu(self[-1](x) + x)", "goes over"),
    "ModuleList  ": ("for m in self[:-1]: y = m(x)\n        return F.relu(y + self.last(x))", "goes over"),
    "ModuleList   ": ("for m in self[:1]: y = m(x)\n        return F.relu(y + self.last(x))", "rewrite"),
    "Sequential      ": ("return F.relu(self[len(self) - 1](x) + x)", "goes over"),
    "Sequential       ": ("return F.relu(self.run(x) + x)", "goes over"),
    "ModuleList": ("y = x\n        for m in self: y = m(y)\n        return F.relu(y + x)", "goes over"),
    "ModuleList ": ("return F.relu(functools.reduce(lambda y, m: m(y), [*self], x) + x)", "goes over"),
    "ModuleDict": ("y = x\n        for k in self: y = self[k](y)\n        return F.relu(y + x)", "goes over"),
    "Module": (
        "y = x\n        for m in self.children(): y = m(y)\n        return F.relu(y + x)",
        "goes over",
    ),
    "Module ": (
        "y = x\n        for m in self._modules.values(): y = m(y)\n        return F.relu(y + x)",
        "goes over",
    ),
    "Module  ": ("return F.relu(self._modules['0'](x) + x)", "rewrite"),
}
CONTAINER = """
import functools
import torch.nn.functional as F
from torch import nn


class Block(nn.{}):
    def __init__(self, layers=None):
        super().__init__()
        for name in ("0", "last"): self.add_module(name, nn.Conv2d(4, 4, 1))

    def run(self, x):
        for m in self: x = m(x)
        return x

    def forward(self, x):
        {}
"""


@pytest.mark.parametrize("base", CONTAINERS, ids=range(len(CONTAINERS)))
def test_blocks_that_go_over_their_own_children(net_of, base):
    body, edit = CONTAINERS[base]
    net = net_of(CONTAINER.format(base.strip(), body), template="")
    if edit == "rewrite":
        assert isinstance(replace_relus(net, "G1.B1", Probe, example=IMAGES)[1][0].sparta, Probe)
    else:
        assert "self.body" in refused(net, "Block.forward goes over its own children")
