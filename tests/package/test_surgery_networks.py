"""Networks of other kinds: without residual blocks, with other activations, of other dimensions."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparta_act import Sparta
from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from tests.package.test_surgery import IMAGES, Probe, assert_same, assert_untouched, state


def conv(inputs, outputs, d=2):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](inputs, outputs, 3, padding=1)


class Residual(nn.Module):
    def __init__(self, width, act, d=2):
        super().__init__()
        self.conv1, self.act1, self.conv2, self.act2 = (
            conv(width, width, d),
            act(),
            conv(width, width, d),
            act(),
        )

    def forward(self, x):
        return self.act2(self.conv2(self.act1(self.conv1(x))) + x)


def network(act, d=2):
    return nn.Sequential(conv(3, 4, d), act(), nn.Sequential(Residual(4, act, d), Residual(4, act, d)))


def labelled(net, **more):
    return [(s.label, s.name) for s in relu_sites(net, **more) if s.label]


def swapped_by_hand(net, places, new):
    """A copy in which the named modules are new ones: the oracle for swaps."""
    net = copy.deepcopy(net)
    for place in places:
        parent, _, key = place.rpartition(".")
        setattr(net.get_submodule(parent), key, new())
    return net


OTHERS = {
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU("tanh"),
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
    "prelu": nn.PReLU,
    "softplus": nn.Softplus,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_activations_are_replaced_only_when_asked_for(kind):
    net = network(OTHERS[kind])
    before = state(net)
    for sites in ("G*.B*", "1", "*"):
        with pytest.raises(SiteError, match=f'ask for kinds="{kind}"'):
            replace_relus(net, sites, Probe)
    assert_untouched(net, before)
    expected = swapped_by_hand(net, ["2.1.act2"], lambda: Probe(4))
    replace_relus(net, "G1.B2", Probe, kinds=kind)
    assert_same(net(IMAGES), expected(IMAGES))
    restore_relus(net)
    assert_untouched(net, before)


class Mixed(nn.Module):
    """A LeakyReLU as a function with a slope, after a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x):
        return F.leaky_relu(self.conv(F.relu(x)) + x, 0.2)


def test_kinds_choose_which_call_is_the_last():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Mixed(), Mixed()))
    x = net[0](IMAGES)
    for kinds in ("relu", "leaky_relu", "LeakyReLU, ReLU"):
        first = replace_relus(copy.deepcopy(net), "G1.B1", Probe, kinds=kinds)[1][0]
        inner = F.relu(x) if "eaky" in kinds else Probe(4)(x)
        outer = net[1][0].conv(inner) + x
        assert_same(first(x), Probe(4)(outer) if "eaky" in kinds else F.leaky_relu(outer, 0.2))


@pytest.mark.parametrize(
    ("kinds", "problem"),
    [
        ("sigmoid", "kinds: cannot replace 'sigmoid', only relu, relu6, leaky_relu, "),
        ("relu, softmax, ", "kinds: cannot replace 'softmax', '', only relu"),
        ("", "kinds: cannot replace ''"),
        (("relu",), r"kinds must be a text such as \"relu\" or \"relu, relu6\", not \('relu',\)"),
        (nn.ReLU6, "not <class 'torch.nn.modules.activation.ReLU6'>"),
    ],
)
def test_kinds_that_are_refused(kinds, problem):
    for operate in (relu_sites, lambda net, kinds: replace_relus(net, "*", Probe, kinds=kinds)):
        with pytest.raises(SiteError, match=problem):
            operate(network(nn.ReLU), kinds=kinds)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_signals_images_and_volumes(d):
    net = network(nn.ReLU, d)
    assert labelled(net) == [("G1.B1", "2.0.act2"), ("G1.B2", "2.1.act2")]
    x = torch.rand(2, 3, *[8] * d)
    expected = swapped_by_hand(net, ["2.0.act2"], nn.Softplus)
    assert_same(replace_relus(net, "G1.B1", lambda channels: nn.Softplus(), example=x)(x), expected(x))


@pytest.mark.parametrize("d", [1, 3])
def test_sparta_itself_is_for_images(d):
    net = network(nn.ReLU, d)
    before = state(net)[0]
    with pytest.raises(SiteError, match=r"Sparta\(4\) was given .*; it takes \(N, 4, H, W\)"):
        replace_relus(net, "G1.B1", Sparta)
    assert state(net)[0] == before


class Last(nn.Module):
    """As in ConvNeXt: between two permutations the channels are last."""

    def __init__(self):
        super().__init__()
        self.conv, self.line1, self.line2 = conv(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.line2(F.relu(self.line1(self.conv(x).permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2)


def test_maps_with_channels_last_are_no_sites():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Last(), Last()))
    with pytest.raises(SiteError, match="its last ReLU runs on maps with channels last; call it on"):
        replace_relus(net, "G1.B1", Probe)
    assert not [s for s in relu_sites(net) if s.edit]


class Dense(nn.Module):
    """As in DenseNet: maps are concatenated, never added."""

    def __init__(self, width):
        super().__init__()
        self.relu1, self.conv1 = nn.ReLU(), conv(width, 4)
        self.relu2, self.conv2 = nn.ReLU(), conv(4, 4)

    def forward(self, x):
        return torch.cat([x, self.conv2(self.relu2(self.conv1(self.relu1(x))))], 1)


class DenseBlock(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


def test_without_a_sum_blocks_are_what_stands_among_its_like():
    between = nn.Sequential(conv(12, 4), nn.ReLU())
    stages = [DenseBlock({"a": Dense(4), "b": Dense(8)}), between, DenseBlock({"a": Dense(4)})]
    net = nn.Sequential(conv(3, 4), *stages)
    assert labelled(net) == [("G1.B1", "1.a.relu2"), ("G1.B2", "1.b.relu2"), ("G2.B1", "3.a.relu2")]
    expected = swapped_by_hand(net, ["1.b.relu2", "3.a.relu2"], lambda: Probe(4))
    assert_same(replace_relus(net, "G*.B-1", Probe)(IMAGES), expected(IMAGES))


class Stage(nn.Module):
    """As in DLA: blocks that are attributes, not items of a container."""

    def __init__(self, block=lambda: Residual(4, nn.ReLU)):
        super().__init__()
        self.tree1, self.tree2, self.root = block(), block(), conv(8, 4)

    def forward(self, x):
        x1 = self.tree1(x)
        return F.relu(self.root(torch.cat([x1, self.tree2(x1)], 1)))


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.level1, self.level2 = conv(3, 4), Stage(), Stage(Stage)

    def forward(self, x):
        return self.level2(self.level1(self.stem(x)))


def test_without_containers_groups_are_the_parts_of_the_network():
    assert labelled(Tree()) == [
        ("G1.B1", "level1.tree1.act2"),
        ("G1.B2", "level1.tree2.act2"),
        ("G2.B1", "level2.tree1.tree1.act2"),
        ("G2.B2", "level2.tree1.tree2.act2"),
        ("G2.B3", "level2.tree2.tree1.act2"),
        ("G2.B4", "level2.tree2.tree2.act2"),
    ]
    assert not labelled(Stage())  # its parts are the blocks themselves


class Level(nn.Module):
    """As in a U-Net with attention: levels within levels, each with a gate that adds."""

    def __init__(self, inside):
        super().__init__()
        self.gate, self.inside = Residual(4, nn.ReLU), inside

    def forward(self, x):
        return self.gate(self.inside(x))


def test_blocks_of_levels_within_levels_are_no_group():
    assert not labelled(nn.Sequential(conv(3, 4), Level(Level(conv(4, 4)))))
    in_one = nn.Sequential(conv(3, 4), Stage())
    assert labelled(in_one) == [("G1.B1", "1.tree1.act2"), ("G1.B2", "1.tree2.act2")]


class Merging(nn.Module):
    """As in EfficientViM: the downsampling beside the blocks of a stage adds too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(4, nn.ReLU), Residual(4, nn.ReLU))
        self.down = Residual(4, nn.ReLU)

    def forward(self, x):
        return F.max_pool2d(self.down(self.blocks(x)), 2)


def test_beside_a_container_of_blocks_one_that_is_an_attribute_is_no_group():
    names = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
    labels = ["G1.B1", "G1.B2", "G2.B1", "G2.B2"]
    net = nn.Sequential(OrderedDict(stem=conv(3, 4), stages=nn.Sequential(Merging(), Merging())))
    assert labelled(net) == [(label, f"{name}.act2") for label, name in zip(labels, names, strict=True)]
    assert "stages.0.down.act2" in [s.name for s in relu_sites(net)]
    net.stages.append(Stage())  # where others are containers, a stage of attributes alone is a group
    assert labelled(net)[-2:] == [("G3.B1", "stages.2.tree1.act2"), ("G3.B2", "stages.2.tree2.act2")]


class Ghost(nn.Module):
    """A residual block of two residual parts: the block is what the container holds."""

    def __init__(self):
        super().__init__()
        self.part1, self.part2 = Residual(4, nn.ReLU), Residual(4, nn.ReLU)

    def forward(self, x):
        return self.part2(self.part1(x)) + x


class Apart(nn.Module):
    """As in transformers: a part without an activation makes the sum."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(4, 4)

        def forward(self, x, shortcut):
            return self.conv(x) + shortcut

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.sum = conv(4, 4), nn.ReLU(), Apart.Sum()

    def forward(self, x):
        return self.sum(self.act(self.conv(x)), x)


@pytest.mark.parametrize(("block", "last"), [(Ghost, "part2.act2"), (Apart, "act")])
def test_what_a_container_holds_is_the_block(block, last):
    net = nn.Sequential(conv(3, 4), nn.Sequential(block(), block()))
    assert labelled(net) == [("G1.B1", f"1.0.{last}"), ("G1.B2", f"1.1.{last}")]


class Returns(nn.Module):
    """A network that takes named arguments, and returns its maps in a dict within an object."""

    class Output(dict):
        pass

    def __init__(self):
        super().__init__()
        self.body = network(nn.ReLU)

    def forward(self, *, image, flip=False):
        maps = self.body(image.flip(3) if flip else image)
        return self.Output(maps={"last": [maps]})


def test_named_arguments_and_any_container_of_results():
    net, example = Returns(), {"image": IMAGES, "flip": True}
    with pytest.raises(
        SiteError, match=r"does not run in training mode .*\nPass an input that it takes in both modes"
    ):
        replace_relus(net, "G1.B1", Probe)
    expected = swapped_by_hand(net, ["body.2.0.act2"], lambda: Probe(4))(**example)
    assert_same(replace_relus(net, "G1.B1", Probe, example=example)(**example), expected)


class InPlaceInTraining(Residual):
    """Only in training, what the in-place ReLU has changed is used again."""

    def forward(self, x):
        y = self.conv1(x) + x
        z = F.relu(y, inplace=True)
        return z + y if self.training else z


def test_a_network_that_would_change_in_training_alone_is_refused():
    net = nn.Sequential(conv(3, 4), nn.Sequential(InPlaceInTraining(4, nn.ReLU)))
    before = state(net)
    with pytest.raises(SiteError, match="what an in-place activation has changed"):
        replace_relus(net, "G1.B1", Probe)
    assert_untouched(net, before)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x):
        return F.relu(self.conv(x))


class Early(nn.Module):
    """Leaves early, by another ReLU, if a flag is set or by chance."""

    def __init__(self, chance=0.0):
        super().__init__()
        self.conv1, self.conv2, self.relu, self.act = conv(4, 4), conv(4, 4), nn.ReLU(), nn.ReLU()
        self.flag, self.chance = False, chance

    def forward(self, x):
        if self.flag or (self.training and torch.rand(()) < self.chance):
            return self.leave(x) if self.chance else F.relu(x)
        x = self.conv2(F.relu(self.conv1(x))) + x
        return F.relu(x)

    def leave(self, x):
        return F.relu(x)


class EarlyBySwap(Early):
    def forward(self, x):
        if self.flag:
            return self.relu(x)
        return self.act(self.conv2(self.conv1(x)) + x)


@pytest.mark.parametrize("block", [Early, EarlyBySwap])
def test_a_call_that_no_pass_has_run_but_may_come_last_is_refused(block):
    net = nn.Sequential(conv(3, 4), nn.Sequential(block(), block()))
    before = state(net)
    with pytest.raises(SiteError, match=r"line \d+ \(Early.*forward\) calls ReLU too, which may be the last"):
        replace_relus(net, "G1.B1", Probe)
    assert_untouched(net, before)


def test_hooks_on_a_relu_are_not_lost():
    net = network(nn.ReLU)
    hook = net[2][0].act2.register_forward_hook(lambda *_: None)
    with pytest.raises(SiteError, match="its ReLU has hooks, which would go with it; remove them first"):
        replace_relus(net, "G1.B1", Probe)
    hook.remove()
    replace_relus(net, "G1.B1", Probe)


class Down(nn.Module):
    """Two convolutions, as a U-Net has them."""

    def __init__(self, inputs):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, 4), conv(4, 4)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))))


def test_one_block_beside_other_modules_is_no_group():
    net = nn.Sequential(
        Down(3), nn.Sequential(nn.MaxPool2d(2), Down(4)), nn.Sequential(nn.MaxPool2d(2), Down(4))
    )
    assert [(s.label, s.name) for s in relu_sites(net)] == [("", "0"), ("", "1.1"), ("", "2.1")]


class Counting(Residual):
    """Keeps numbers in a tensor that is no buffer."""

    def __init__(self):
        super().__init__(4, nn.ReLU)
        self.passes = torch.zeros(3)

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def test_tensors_that_are_no_buffers_are_as_before():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Counting()))
    relu_sites(net)
    replace_relus(net, "1.0.act2", Probe)
    assert torch.equal(net[1][0].passes, torch.zeros(3))


@pytest.mark.parametrize(
    ("net", "kinds", "table"),
    [
        (Own(), "relu", "nothing: ReLU is called in the forward of the network itself, which has no name"),
        (nn.Sequential(conv(3, 4), nn.SiLU()), "relu", 'no ReLU on a feature map, but silu; .*kinds="silu"'),
        (nn.Sequential(conv(3, 4)), "relu, gelu", "nothing: no ReLU or gelu on a feature map."),
        (
            nn.Sequential(twice := nn.Sequential(conv(3, 3), nn.ReLU()), twice),
            "relu",
            "0.1: it is called 2 times",
        ),
    ],
)
def test_a_network_without_sites_says_why(net, kinds, table):
    sites = relu_sites(net, kinds=kinds)
    assert not sites
    with pytest.raises(SiteError, match=table):
        raise SiteError(str(sites))
    with pytest.raises(SiteError, match=table):
        replace_relus(net, "x", Probe, kinds=kinds)


def test_the_table_of_a_hundred_blocks():
    groups = [nn.Sequential(*(Residual(4, nn.ReLU) for _ in range(n))) for n in (2, 97, 1)]
    sites = relu_sites(nn.Sequential(conv(3, 4), nn.ReLU(), *groups))
    assert len(sites) == 201
    assert str(sites) == (
        "site       name       channels  calls  parameters  edit\n"
        "G1.B1      2.0.act2   4         1      +973        swap\n"
        "G1.B2      2.1.act2   4         1      +973        swap\n"
        "G2.B1      3.0.act2   4         1      +973        swap\n"
        "...        (95 more)\n"
        "G2.B97     3.96.act2  4         1      +973        swap\n"
        "G3.B1      4.0.act2   4         1      +973        swap\n"
        "           1          4         1      +973        swap\n"
        "100 sites  *.*.act1   4         1      +973        swap\n"
        '201 calls of ReLU on feature maps ("all")'
    )


class Pooled(nn.Module):
    """As in CBAM: maps of one pixel are added at any size of the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = conv(4, 4), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        pooled = y.mean((2, 3), keepdim=True) + y.amax((2, 3), keepdim=True)
        return self.act(y * torch.sigmoid(pooled)) + x


class Shrinking(nn.Module):
    """Its last call is on a single pixel if the input is small."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act1, self.act2 = conv(4, 4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.act2(self.conv2(F.max_pool2d(self.act1(self.conv1(x)), 2)))


@pytest.mark.parametrize("body", [Pooled, nn.Identity])
def test_the_example_is_large_enough_for_the_last_map(body):
    down = nn.Sequential(*(nn.Conv2d(4, 4, 1, 2) for _ in range(4)))
    net = nn.Sequential(conv(3, 4), body(), down, nn.Sequential(Shrinking(), conv(4, 4), Shrinking()))
    assert "3.2.act2" in [s.name for s in relu_sites(net)]


class Chance(nn.Module):
    """In training, takes another module's ReLU last, by chance."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.other = conv(4, 4), nn.ReLU(), nn.Sequential(nn.Identity(), nn.ReLU())

    def forward(self, x):
        y = self.act(self.conv(x) + x)
        return self.other(y) if self.training and torch.rand(()) < 0.5 else y


def test_what_is_drawn_in_training_is_seen():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Chance(), Chance()))
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(SiteError, match="called by another module in some passes than in others"):
            replace_relus(net, "G1.B1", Probe)


class Gated(Residual):
    """What the in-place ReLU has changed is used again, behind a factor that is zero at first."""

    def __init__(self):
        super().__init__(4, nn.ReLU)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        y = self.conv1(x) + x
        return F.relu(y, inplace=True) + self.alpha * y


def test_an_alias_behind_a_zero_is_seen():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Gated(), Gated()))
    with pytest.raises(SiteError, match="what an in-place activation has changed"):
        replace_relus(net, "G1.B1", Probe)


def test_an_activation_that_draws_random_numbers_is_no_fault_of_the_network():
    net = nn.Sequential(conv(3, 4), nn.Dropout(), nn.Sequential(Residual(4, nn.ReLU)), nn.Dropout())
    replace_relus(net, "2.0.act2", lambda channels: nn.RReLU())


class InFloat(nn.Module):
    def forward(self, x):
        return x.float()


def test_an_integer_parameter_says_nothing_of_the_images():
    net = nn.Sequential(nn.Module(), conv(3, 4), nn.ReLU())
    net[0].register_parameter("bits", nn.Parameter(torch.tensor([8]), requires_grad=False))
    net[0].forward = lambda x: x
    assert [s.name for s in relu_sites(net)] == ["2"]


def test_restoring_after_the_network_was_moved_or_changed():
    net = network(nn.PReLU)
    replace_relus(net, "G1.B1", Probe, kinds="prelu")
    restore_relus(net.double())
    assert net[2][0].act2.weight.dtype is torch.float64
    net = nn.Sequential(conv(3, 4), InFloat(), nn.PReLU(), conv(4, 4)).bfloat16()
    net[2].float(), net[3].float()
    replace_relus(net, "2", nn.SiLU, kinds="prelu", example=IMAGES.bfloat16())
    restore_relus(net)(IMAGES.bfloat16())
    assert net[2].weight.dtype is torch.float32
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU())
    replace_relus(net, "1", Probe)
    net.insert(0, nn.Identity())
    before = state(net)
    with pytest.raises(SiteError, match="the activation that was put at '1' of a Sequential is gone"):
        restore_relus(net)
    assert_untouched(net, before)


REGISTER = {}


class Registered(Residual):
    def __init_subclass__(cls, *, name):
        REGISTER[name] = cls

    def forward(self, x):
        return F.relu(self.conv2(self.act1(self.conv1(x))) + x)


class Named(Registered, name="first"):
    pass


def test_registers_of_subclasses_are_left_alone():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Named(4, nn.ReLU)))
    replace_relus(net, "1.0", Probe)
    assert list(REGISTER.items()) == [("first", Named)]
    assert isinstance(copy.deepcopy(net)[1][0], Named)
    assert isinstance(net[1][0].sparta, Probe)


def with_factor(factor):
    def forward(self, x):
        return F.relu(self.conv1(x) + x) * factor

    return forward


def test_one_class_with_two_forwards():
    class Changing(Residual):
        pass

    for factor in (1.0, 2.0):
        Changing.forward = with_factor(factor)
        net = nn.Sequential(conv(3, 4), nn.Sequential(Changing(4, nn.ReLU)))
        x = net[0](IMAGES)
        expected = Probe(4)(net[1][0].conv1(x) + x) * factor
        assert_same(replace_relus(net, "1.0", Probe)(IMAGES), expected)


class Building(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x):
        if not hasattr(self, "act"):
            self.act = nn.Sequential(nn.ReLU())
        return self.act(self.conv(x))


class Averaging(Residual):
    """Writes to a parameter behind autograd's back, gives another a gradient, and stops a third."""

    def forward(self, x):
        self.conv1.weight.data.mul_(0.5)
        self.conv1.bias.grad = torch.ones(4)
        self.conv2.weight.requires_grad_(False)
        return super().forward(x)


def test_what_a_forward_does_to_parameters_is_undone():
    net = nn.Sequential(conv(3, 4), nn.Sequential(Averaging(4, nn.ReLU)))
    before = state(net)
    relu_sites(net)
    assert_untouched(net, before)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(SiteError, match="makes modules in its first pass; run it once on an input before"):
        relu_sites(nn.Sequential(Building()))


def test_inference_mode_and_other_default_devices():
    for context in (torch.inference_mode(), torch.device("meta")):
        net = network(nn.ReLU)
        with context:
            replace_relus(net, "G1.B1", lambda channels: nn.Softplus())
        assert_same(net(IMAGES), swapped_by_hand(restore_relus(net), ["2.0.act2"], nn.Softplus)(IMAGES))
