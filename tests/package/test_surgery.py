import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparta_act.activations import Sparta, SwishReLU
from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from tests.helpers import nets

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

# For each manner: the edit, ReLU calls per block, and which of them, from 0, is the last on a feature map.
MANNERS = [
    (nets.OneModule, "rewrite", 2, 1),
    (nets.TwoModules, "swap", 2, 1),
    (nets.Functional, "rewrite", 2, 1),
    (nets.OneLine, "rewrite", 4, 3),
    (nets.ManyLines, "rewrite", 2, 1),
    (nets.Method, "rewrite", 2, 1),
    (nets.Inline, "rewrite", 2, 1),
    (nets.Conditional, "rewrite", 2, 1),
    (nets.ByMode, "rewrite", 2, 1),
    (nets.PreActivation, "rewrite", 2, 1),
    (nets.SqueezeLast, "swap", 2, 0),
    (nets.Inherited, "rewrite", 3, 2),
    (nets.local_class(), "rewrite", 2, 1),
    (nets.Wrapped, "swap", 2, 1),
    (nets.SharedAct, "rewrite", 2, 1),
]
each_manner = pytest.mark.parametrize(
    ("block", "edit", "per_block", "last"), MANNERS, ids=lambda v: getattr(v, "__name__", None)
)


class Probe(nn.Module):
    """An activation that nothing else computes, with a parameter and a running statistic."""

    def __init__(self, in_channels):
        super().__init__()
        self.in_channels = in_channels
        self.slope = nn.Parameter(torch.full((in_channels, 1, 1), 0.5))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x.clamp_min(0) * self.slope + 0.1


class Overriding(TorchFunctionMode):
    """The oracle: computes the n-th ReLU calls of a pass otherwise, without any surgery."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen, self.count = chosen, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("relu", "relu_"):
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        return x.clamp_min(0) * 0.5 + 0.1 if self.count - 1 in self.chosen else func(*args, **kwargs)


def outputs(model, training, chosen=()):
    """What a copy of the model computes, and its buffers after that."""
    model = copy.deepcopy(model).train(training)
    with Overriding(chosen) as mode:
        y = model(IMAGES)
    statistics = [b for n, b in model.named_buffers() if "seen" not in n]
    return mode.count, [y, *statistics]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def state(model):
    """Everything a failed surgery could leave behind."""
    modules = [
        (n, m, type(m), m.training, len(m._forward_hooks), [*vars(m)]) for n, m in model.named_modules()
    ]
    tensors = {n: (t, t.clone(), t.grad) for n, t in (*model.named_parameters(), *model.named_buffers())}
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return modules, tensors, (torch.get_rng_state().tolist(), random.getstate(), numpy)


def assert_untouched(model, before):
    modules, tensors, random_state = before
    assert state(model)[0] == modules
    for name, (tensor, value, grad) in state(model)[1].items():
        assert tensor is tensors[name][0]
        assert grad is tensors[name][2]
        assert_same(value, tensors[name][1])
    assert state(model)[2] == random_state


@each_manner
def test_the_last_relu_of_each_chosen_block_is_replaced(block, edit, per_block, last):
    net = nets.Net(block)
    chosen = [1 + b * per_block + last for b in (1, 2)]  # call 0 is the stem's
    expected = [outputs(net, training, chosen) for training in (False, True)]
    assert expected[0][0] == 1 + 4 * per_block + 1
    assert replace_relus(net, "G1.B2,G2.B1", Probe) is net
    for training in (False, True):
        assert_same(outputs(net, training)[1], expected[training][1])


@each_manner
def test_the_sites_of_each_manner(block, edit, per_block, last):
    sites = relu_sites(nets.Net(block))
    blocks = [s for s in sites if s.label]
    assert [(s.label, s.channels, s.calls, s.edit) for s in blocks] == [
        ("G1.B1", 4, 1, edit), ("G1.B2", 4, 1, edit), ("G2.B1", 8, 1, edit), ("G2.B2", 8, 1, edit)
    ]  # fmt: skip
    assert [s.name for s in sites if s.name.startswith("stem")] == ["stem.2"]
    assert not [s for s in sites if s.name.startswith("unused")]


@each_manner
def test_restoring_undoes_it_exactly(block, edit, per_block, last):
    net = nets.Net(block)
    before, expected = state(net), [outputs(net, training) for training in (False, True)]
    keys = list(net.state_dict())
    replace_relus(net, "G*.B*", Probe)
    added = set(net.state_dict()) - set(keys)
    assert len(added) == 8
    assert [k for k in net.state_dict() if k not in added] == keys
    assert all(isinstance(m, block) for m in (*net.layer1, *net.layer2))
    assert restore_relus(net) is net
    assert_untouched(net, before)
    for training in (False, True):
        assert_same(outputs(net, training), expected[training])


def test_the_table():
    assert str(relu_sites(nets.Net(nets.OneModule))) == (
        "site   name      channels  calls  parameters  edit\n"
        "G1.B1  layer1.0  4         1      +973        rewrite\n"
        "G1.B2  layer1.1  4         1      +973        rewrite\n"
        "G2.B1  layer2.0  8         1      +1,873      rewrite\n"
        "G2.B2  layer2.1  8         1      +1,873      rewrite\n"
        "       stem.2    4         1      +973        swap\n"
        '9 calls of ReLU on feature maps ("all"), 1 elsewhere'
    )


def test_the_table_of_what_is_replaced():
    net = nets.Net(nets.TwoModules)
    size = sum(p.numel() for p in net.parameters())
    replace_relus(net, "G*.B2", Sparta)
    replace_relus(net, "stem.2", nn.PReLU)
    assert str(relu_sites(net)) == (
        "site     name           channels  calls  parameters  edit\n"
        "G1.B1    layer1.0.act2  4         1      +973        swap\n"
        "G1.B2    layer1.1.act2  4         1      973         Sparta\n"
        "G2.B1    layer2.0.act2  8         1      +1,873      swap\n"
        "G2.B2    layer2.1.act2  8         1      1,873       Sparta\n"
        "4 sites  layer*.*.act1  4-8       1      +973-1,873  swap\n"
        "         stem.2         4         1      4           PReLU\n"
        '6 calls of ReLU on feature maps ("all"), 1 elsewhere\n'
        f"3 replaced: {size:,} parameters before, {size + 2850:,} now ({(size + 2850) / size:.2f} times)"
    )
    slopes = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4))
    assert "1 replaced: 116 parameters before, 112 now (0.97 times)" in str(
        relu_sites(replace_relus(slopes, "1", SwishReLU, kinds="prelu"))
    )


def test_looking_leaves_no_trace():
    net = nets.Net(nets.Skipped).train()
    net.layer1.eval()
    net.stem.append(nn.Dropout())
    before = state(net)
    relu_sites(net)
    assert_untouched(net, before)


def test_new_modules_are_like_the_block():
    net = nets.Net(nets.OneModule).double().train()
    net.layer1[0].eval()
    replace_relus(net, "G1.B{1,2}", Probe)
    new = [block.sparta for block in net.layer1]
    assert [m.slope.dtype for m in new] == [torch.float64] * 2
    assert [m.training for m in new] == [False, True]
    assert [m.seen.item() for m in new] == [0, 0]


def test_a_second_replacement_and_a_replaced_site():
    net = nets.Net(nets.Functional)
    expected = outputs(net, False, [2, 4])[1]
    replace_relus(net, "G1.B1", Probe)
    replace_relus(net, "G1.B2", Probe)
    assert_same(outputs(net, False)[1], expected)
    for sites in ("G1.B2", "layer1.1"):
        with pytest.raises(SiteError, match="replaced already"):
            replace_relus(net, sites, Probe)
    restore_relus(net)
    with pytest.raises(
        SiteError,
        match=r"^no ReLU of this model has been replaced, so none can be restored\. Nothing was changed\.$",
    ):
        restore_relus(net)


@pytest.mark.parametrize(
    "activation",
    [
        lambda c: nn.Identity(),
        lambda c: nn.ReLU(),
        lambda c: nn.Sequential(nn.ReLU(), nets.Unit(c, c)),
    ],
)
def test_a_replaced_site_keeps_its_place(activation):
    net = nets.Net(nets.PreActivation)
    replace_relus(net, "G1.B1", activation)
    sites = relu_sites(net)
    assert [s.label for s in sites if s.problem] == ["G1.B1"]
    assert len([s for s in sites if s.activation is not None]) == 1


def test_blocks_that_are_skipped_at_random():
    net = nets.Net(nets.Skipped).train()
    replace_relus(net, "G*.B*", Probe)
    x = torch.randn(2, 4, 8, 8)
    for block in net.layer1:
        ways = [block(x) for _ in range(40)]
        assert [torch.equal(y, x) for y in ways].count(True) > 5
        assert [torch.equal(y, x.clamp_min(0) * 0.5 + 0.1) for y in ways].count(True) > 5
        assert not [y for y in ways if torch.equal(y, x.relu())]
        assert block.sparta.seen < 40


def test_networks_without_blocks():
    net, example = nets.Plain(), IMAGES[:2]
    expected = outputs(net, True, [0, 2])[1]
    assert [s.name for s in relu_sites(net, example=example)] == ["features.1", "features.3", "features.6"]
    replace_relus(net, "*.1, features.6", Probe, example=example)
    assert_same(outputs(net, True)[1], expected)


def test_seeing_through_wrappers():
    net = nets.Net(nets.OneModule)
    expected = outputs(net, False, [2])[1]
    for wrap in (nn.DataParallel, lambda m: nn.Sequential(nn.Identity(), m)):
        wrapped = wrap(copy.deepcopy(net)).eval()
        assert relu_sites(wrapped)[0].label == "G1.B1"
        assert replace_relus(wrapped, "G1.B1", Probe) is wrapped
        assert_same(wrapped(IMAGES), expected[0])
        assert [m for m in wrapped.modules() if isinstance(m, Probe)]
    replace_relus(wrapped, "1.stem.2", Probe)
    wrapped = nn.Sequential(nn.Identity(), nn.DataParallel(copy.deepcopy(net))).eval()
    replace_relus(wrapped, "1.layer1.0", Probe)
    assert_same(wrapped(IMAGES), expected[0])


def test_units_without_a_sum_are_no_blocks():
    sites = relu_sites(nn.Sequential(nets.Unit(3, 4), nets.Unit(4, 4)))
    assert [(s.label, s.name, s.edit) for s in sites] == [("", "0", "rewrite"), ("", "1", "rewrite")]


def test_wildcards_take_what_can_be_replaced():
    net = replace_relus(nets.Net(nets.OneModule), "*", Probe)
    assert len([m for m in net.modules() if isinstance(m, Probe)]) == 5


LABELED = {"G1.B1": 4, "G1.B2": 4, "G3.B1": 8}


def test_a_set_goes_where_its_channels_and_labels_fit():
    activations = {label: Probe(c).requires_grad_(False) for label, c in LABELED.items()}
    activations["G1.B2"].slope += 1
    net = replace_relus(nets.Net(nets.OneModule).double(), "G*.B*", activations)
    new = [block.sparta for block in (*net.layer1, *net.layer2)]
    assert [m.slope[0].item() for m in new] == [0.5, 1.5, 0.5, 0.5]
    assert not any(m.slope.requires_grad for m in new)
    assert {m.slope.dtype for m in new} == {torch.float64}
    assert len({id(m) for m in (*new, *activations.values())}) == 7
    assert activations["G1.B1"].slope.dtype is torch.float32


def test_a_set_that_does_not_fit():
    net = nets.Net(nets.OneModule)
    before = state(net)
    with pytest.raises(SiteError) as error:
        replace_relus(net, "G*.B2,stem.2", {"G1.B1": Probe(4), 3: Probe(4)})
    assert str(error.value).splitlines() == [
        "the activations do not fit the sites:",
        "G1.B2 has 4 channels: G1.B1 and 3 fit",
        "G2.B2 has 8 channels: none fits",
        "stem.2 has 4 channels: G1.B1 and 3 fit",
        "The set has G1.B1 with 4, 3 with 4. Name other sites, or give no set: then each gets a fresh "
        "`Sparta`.",
        "Nothing was changed.",
    ]
    assert_untouched(net, before)
