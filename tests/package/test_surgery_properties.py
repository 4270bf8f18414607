"""The surgery on thousands of texts and blocks that nobody wrote by hand: it is right, or it refuses."""

import importlib.util
import itertools
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.grammar import Label, Name, parse, select
from sparta_act.surgery.kinds import KINDS, parse_kinds
from sparta_act.surgery.replacing import replace_relus, restore_relus
from sparta_act.surgery.sites import Site, SiteList
from tests.helpers import nets
from tests.package.test_surgery import (
    Probe,
    assert_untouched,
    state,
)

RELU = frozenset({"relu"})

numbers = st.one_of(st.none(), st.lists(st.integers(-12, 12), min_size=1, max_size=4).map(tuple))
labels = st.builds(Label, numbers, numbers)
patterns = st.from_regex(r"[a-z_*?][a-z0-9_.*?\[\]-]{0,12}", fullmatch=True).map(Name)
terms = st.lists(st.one_of(labels, patterns), min_size=1, max_size=5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(terms, st.sampled_from([",", ", ", " ,  "]))
def test_what_is_printed_is_parsed_again(asked, comma):
    assert parse(comma.join(map(str, asked))) == asked


@given(st.text(max_size=30))
@example("G{1,2.B1")
@example("G{1,2}}.B1")
@example("a,,b")
@example("G\u0661.B1")  # a digit, but not one of ours
def test_any_text_is_read_or_refused_by_name(text):
    try:
        read = parse(text)
    except SiteError as error:
        lines = str(error).splitlines()
        assert repr(text) in lines[0] or not text.strip()
        bad = [line.split(":")[0] for line in lines[1:]]
        assert all(part == "empty name" or part in text for part in bad)
    else:
        assert parse(",".join(map(str, read))) == read


def listed(sizes):
    sites = [Site(f"layer{g}.{b}", group=g, block=b) for g, n in enumerate(sizes, 1) for b in range(1, n + 1)]
    return SiteList([*sites, Site("stem.relu")], "nothing", "")


def meant(label, sizes):
    """The groups and blocks of a label, counted by hand; None where one does not exist."""
    found = set()
    for g in range(1, len(sizes) + 1) if label.groups is None else label.groups:
        g = len(sizes) + 1 + g if g < 0 else g
        if not 1 <= g <= len(sizes):
            return None
        for b in range(1, sizes[g - 1] + 1) if label.blocks is None else label.blocks:
            b = sizes[g - 1] + 1 + b if b < 0 else b
            if not 1 <= b <= sizes[g - 1]:
                return None
            found.add((g, b))
    return found


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.lists(labels, min_size=1, max_size=3))
def test_labels_choose_what_they_say(sizes, asked):
    sites, expected = listed(sizes), [meant(label, sizes) for label in asked]
    text = ",".join(map(str, asked))
    if None in expected:
        with pytest.raises(SiteError) as error:
            select(sites, text, RELU, list)
        problems = str(error.value).split("This network has:")[0].splitlines()[1:]
        named = {str(label) for label, e in zip(asked, expected, strict=True) if e is None}
        assert {p.split(": there is no")[0] for p in problems} == named
    else:
        assert {(s.group, s.block) for s in select(sites, text, RELU, list)} == set().union(*expected)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.data())
def test_kinds_in_any_spelling(kinds, data):
    spellings = [lambda k: k, str.upper, lambda k: k.replace("_", ""), lambda k: f" {k.title()} "]
    text = ",".join(data.draw(st.sampled_from(spellings))(k) for k in kinds)
    assert parse_kinds(text) == set(kinds)
    with pytest.raises(SiteError, match=r"cannot replace 'rulu', only relu, relu6, "):
        parse_kinds(text + ", rulu")


# Ways to write one step of a forward. Some the surgery edits, some it refuses; it must know which.
STEPS = """
x = self.conv1(x)
x = self.relu(x)
x = self.relu(self.conv2(x))
x = self.act1(x)
x = self.act2(x)
x = self.tail(x)
x = F.relu(x)
x = F.relu(x, True)
x = F.relu(self.conv1(x), inplace=True)
x = F.relu(input=x)
x = torch.relu(x) - 0.1
x = (x - 0.1).relu()
x = x.clone().relu_()
x = F.relu_(x * 1)
x = nn.ReLU()(x)
x = F.relu(F.relu(x) - 0.1)
x = F.relu(x) - F.relu(-x)
x, y = F.relu(x), F.relu(x - 0.1)
x = F.relu(x) if self.training else torch.relu(x - 0.1)
x = x if self.training else F.relu(x)
if self.training: x = F.relu(x)
if (y := F.relu(x)).sum() > 0: x = y
y = F.relu(x); x = x - y
y = F.relu(x, True); x = x - y
y = self.relu(x); x = x - y
F.relu_(x)
F.relu(x)
for _ in range(2): x = F.relu(x - 0.1)
for f in (self.relu, F.relu): x = f(x - 0.1)
while True: x = F.relu(x); break
x = [F.relu(t) for t in (x, x)][0]
x = (lambda t: F.relu(t))(x)
x = self.helper(x)
x = F.relu(*[x])
x = F.relu(**{"input": x})
x = getattr(F, "relu")(x)
relu = F.relu; x = relu(x)
x = partial(F.relu, inplace=False)(x)
x = {"a": F.relu(x)}["a"]
x = F.relu(x)[:, :]
x += F.relu(x)
with torch.enable_grad(): x = F.relu(x)
x = x * torch.sigmoid(F.relu(x.mean((2, 3), keepdim=True)))
x = F.relu(x.flatten(2)).view_as(x)
x = F.relu6(x)
x = F.relu(x) if type(self).__name__ == "Block" else F.relu(x) * 2
x = self.inner(x)
if self.rare: x = F.relu(x)
if self.rare: return F.relu(x)
if self.rare: return self.act2(x)
x = x - 1 if self.rare or F.relu(x) is None else x
""".strip().splitlines()

BLOCK = """
from functools import partial
import torch
import torch.nn.functional as F
from torch import nn


class Inner(nn.Module):
    def forward(self, x):
        return F.relu(x - 0.2)


class Block(nn.Module):
    rare = False

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu, self.act1, self.act2 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU()
        self.tail, self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), self.act2), Inner()

    def helper(self, x):
        return F.relu(x)

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
{steps}
        x = x + shortcut
{after}
        return x
"""

numbered = itertools.count()


def written(tmp_path, steps, after):
    """A network of two blocks of a class with these steps in its forward."""
    indent = [textwrap.indent("\n".join(lines), " " * 8) for lines in (steps, after)]
    name = f"written{next(numbered)}"
    (tmp_path / f"{name}.py").write_text(BLOCK.format(steps=indent[0], after=indent[1]))
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return nn.Sequential(nets.conv3(3, 4), nn.Sequential(module.Block(), module.Block()), nn.Flatten())


@pytest.mark.parametrize("step", STEPS)
def test_each_step_by_itself(tmp_path, step):
    """Which of them are refused is known: a refusal too many is a fault too."""
    refused = {
        "x = self.conv1(x)": "there is no group 1",
        "x, y = F.relu(x), F.relu(x - 0.1)": "the block does not use what its ReLU returns",
        "if self.training: x = F.relu(x)": "there is no group 1",
        "F.relu_(x)": "throws the result of the ReLU away",
        "F.relu(x)": "throws the result of the ReLU away",
        "for _ in range(2): x = F.relu(x - 0.1)": "calls the ReLU in a loop",
        "for f in (self.relu, F.relu): x = f(x - 0.1)": "calls the ReLU in a loop|calls ReLU too",
        "while True: x = F.relu(x); break": "calls the ReLU in a loop",
        "x = [F.relu(t) for t in (x, x)][0]": "called in <listcomp>|calls the ReLU in a loop",
        "x = (lambda t: F.relu(t))(x)": "called in <lambda>",
        "x = self.helper(x)": "called in helper",
        "x = F.relu(*[x])": "hides the input of the ReLU",
        'x = F.relu(**{"input": x})': "hides the input of the ReLU",
        "y = F.relu(x, True); x = x - y": "what an in-place activation has changed",
        "x = x * torch.sigmoid(F.relu(x.mean((2, 3), keepdim=True)))": "ReLU",
        "x = F.relu(x.flatten(2)).view_as(x)": "ReLU",
        "x = F.relu6(x)": 'ask for kinds="relu6"',
        'x = F.relu(x) if type(self).__name__ == "Block" else F.relu(x) * 2': "calls ReLU too",
        "if self.rare: return F.relu(x)": "calls ReLU too",
        "if self.rare: return self.act2(x)": "calls ReLU too",
    }
    net = written(tmp_path, [step, "x = F.relu(x)"] if "self.rare" in step else [step], [])
    if step in refused:
        with pytest.raises(SiteError, match=refused[step]):
            replace_relus(net, "G1.B*", Probe)
    else:
        replace_relus(net, "G1.B*", Probe)


class Stop(BaseException):
    """As when somebody presses Ctrl-C."""


@pytest.mark.parametrize(("block", "error"), [(nets.OneModule, Stop), (nets.TwoModules, RuntimeError)])
def test_stopped_in_any_pass_the_model_is_as_before(block, error):
    net, passes = nets.Net(block), itertools.count(1)
    for deadline in itertools.count(1):
        passes = itertools.count(1)

        def stop(*_, passes=passes, deadline=deadline):
            if next(passes) == deadline:
                raise error("stopped")

        hook = net.layer2[1].conv1.register_forward_pre_hook(stop)
        before = state(net)
        try:
            replace_relus(net, "G*.B2,stem.2", Probe)
        except (error, SiteError):
            assert_untouched(net, before)
        else:  # not stopped, or it tried another example
            restore_relus(net)
        hook.remove()
        if next(passes) <= deadline:
            break
    assert deadline > 6  # it was stopped while it looked, while it checked, and while it compared
