"""Which calls are on feature maps, and which is a block's last: networks whose answer is typed by hand."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import nn

from sparta_act import SwishReLU, relu_sites, replace_relus, restore_relus
from sparta_act.errors import SiteError

C = 6


def conv(inputs=C, outputs=C, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def two_blocks(block):
    return nn.Sequential(conv(3), nn.Sequential(block(), block()))


def replaced_in(net, sites="G1.B2", **more):
    """The names of the modules put in, after a replacement that changes what the network returns."""
    replace_relus(net, sites, lambda channels: SwishReLU(), **more)
    return [name for name, module in net.named_modules() if isinstance(module, SwishReLU)]


class Block(nn.Module):
    """The last ReLU on a feature map is that of `act`, whatever `tail` does after it."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = conv(), nn.ReLU(), conv()
        self.other = nn.ReLU()

    def tail(self, h):
        return self.last(h)

    def forward(self, x):
        return x + self.tail(self.act(self.first(x)))


class OnWeights(Block):
    def tail(self, h):
        return F.conv2d(h, self.other(self.last.weight), padding=1)


class OnNormalizedWeights(Block):
    def tail(self, h):
        w = self.last.weight - self.last.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(h, weight=self.other(w), bias=self.last.bias, padding=1)


class OnEmbedding(Block):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.rand(1, C, 8, 8))

    def tail(self, h):
        places = F.interpolate(self.places, h.shape[2:]).expand_as(h)
        return self.last(h) + self.other(places)


class OnConstants(Block):
    def __init__(self):
        super().__init__()
        self.kept = [torch.rand(C, 1, 1)]  # neither parameter nor buffer

    def tail(self, h):
        return self.last(h) * self.other(torch.zeros_like(h) + self.kept[0])


class OnKernel(Block):
    """A kernel of 3 x 3 for each sample and channel, predicted from the map."""

    def tail(self, h):
        n, _, height, width = h.shape
        kernel = self.other(self.last(F.adaptive_avg_pool2d(h, 3)))
        weight = (kernel / (kernel.sum((2, 3), keepdim=True) + 1)).reshape(n * C, 1, 3, 3)
        y = F.conv2d(h.reshape(1, n * C, height, width), weight, padding=1, groups=n * C)
        return y.view(n, C, height, width)


class Positive(nn.Module):
    def forward(self, weight):
        return F.relu(weight)


class Refined(nn.Module):
    """Adds maps, and has a ReLU on its weights alone: no block."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.utils.parametrize.register_parametrization(conv(), "weight", Positive())

    def forward(self, x):
        return x + self.conv(x)


class WithRefined(Block):
    def __init__(self):
        super().__init__()
        self.refined = Refined()

    def forward(self, x):
        return self.refined(super().forward(x))


class ByAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer1 = conv(3), nn.Module()
        self.layer1.k0, self.layer1.k1, self.layer1.project = WithRefined(), WithRefined(), conv()

    def forward(self, x):
        return self.layer1.project(self.layer1.k1(self.layer1.k0(self.stem(x))))


def test_a_relu_on_weights_makes_no_block():
    net = ByAttributes()
    assert [s.label for s in relu_sites(net) if s.label] == ["G1.B1", "G1.B2"]
    assert replaced_in(net) == ["layer1.k1.act"]


class OnContext(Block):
    """A weighted sum over all places is one number for each channel, in whatever form."""

    def __init__(self):
        super().__init__()
        self.score, self.down, self.up = conv(C, 1, 1), conv(C, 2, 1), conv(2, C, 1)

    def tail(self, h):
        weights = self.score(h).flatten(2).softmax(-1).unsqueeze(-1)
        context = h.flatten(2).unsqueeze(1) @ weights
        return self.last(h) * self.up(self.other(self.down(context.view(len(h), C, 1, 1))))


@pytest.mark.parametrize(
    "block", [OnWeights, OnNormalizedWeights, OnEmbedding, OnConstants, OnKernel, OnContext]
)
def test_only_what_is_computed_from_the_input_is_a_map(block):
    assert replaced_in(two_blocks(block)) == ["1.1.act"]


class OnChosenPlaces(Block):
    def tail(self, h):
        return self.last(h.masked_scatter(h > -9, self.other(h[h > -9])))


def test_a_relu_on_chosen_places_is_the_last_but_no_site():
    site = relu_sites(two_blocks(OnChosenPlaces))[1]
    assert (site.label, site.how) == ("G1.B2", None)
    assert "in another form than (N, C, ...)" in site.problem


class ThroughBuffer(Block):
    """A map that is written into new memory, whole or in part, is a map."""

    def tail(self, h):
        y = torch.zeros(h.shape)
        y[:, :2], y[:, 2:] = h[:, 2:4], h[:, [0, 1, 4, 5]]
        return self.other(self.last(self.other(y)))


class ThroughAttention(Block):
    """A pool and a norm take (N, C, H, W) alone, so that what they return has its channels there."""

    def __init__(self):
        super().__init__()
        self.qkv, self.pool, self.norm = conv(C, 3 * C, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C)

    def tail(self, h):
        q, k, v = self.qkv(h).flatten(2).chunk(3, 1)
        h = (v @ (q.transpose(1, 2) @ k).softmax(1)).view(h.shape)
        return self.other(self.norm(self.pool(h)[..., 1:]))[..., [0, *range(h.shape[3] - 1)]]


class ThroughView(Block):
    def tail(self, h):
        y = h.new_empty(h.shape)
        y.transpose(2, 3).copy_(h)
        return self.other(y)


@pytest.mark.parametrize("block", [ThroughBuffer, ThroughView, ThroughAttention])
def test_a_map_is_one_also_where_it_was_copied_to(block):
    site = relu_sites(two_blocks(block))[1]
    assert (site.label, site.channels) == ("G1.B2", C)
    assert "tail" in site.problem if block is ThroughBuffer else site.name == "1.1.other"


class LinearGate(nn.Module):
    """Squeeze and excite by nn.Linear, with the channels last in between."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(C, 2), nn.Linear(2, C)

    def forward(self, x):
        w = F.relu(self.down(x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True)))
        return x * torch.sigmoid(self.up(w)).permute(0, 3, 1, 2)


class LinearMix(nn.Module):
    """A 1 x 1 convolution by nn.Linear: channels last, activation there, and back."""

    def __init__(self):
        super().__init__()
        self.mix, self.back = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x):
        return self.back(F.relu(self.mix(x.movedim(1, -1)))).movedim(-1, 1)


class LinearWidth(nn.Module):
    """nn.Linear over the columns of a map: its channels stay second."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x):
        return self.mix(x)


class LinearTokens(LinearMix):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.back(F.relu(self.mix(tokens))).mT.reshape(x.shape)


@pytest.mark.parametrize("between", [LinearGate, LinearMix, LinearWidth, LinearTokens])
def test_a_linear_layer_hides_no_activation_on_a_map(between):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.between, self.act1, self.act2 = (
                conv(),
                conv(),
                between(),
                nn.ReLU(),
                nn.ReLU(),
            )

        def forward(self, x):
            return self.act2(self.between(self.b(self.act1(self.a(x)))) + x)

    assert replaced_in(two_blocks(Residual), "G*.B*") == ["1.0.act2", "1.1.act2"]


def test_a_map_without_a_batch_has_no_channels_to_read_off():
    net = nn.Sequential(conv(3, 10), nn.ReLU(), conv(10, 4), nn.ReLU())
    assert "ReLU on a feature map, but relu on a map without a batch" in repr(
        relu_sites(net, example=torch.rand(3, 10, 12))
    )
    with pytest.raises(SiteError, match=r"without a batch dimension \(give example=... of shape"):
        replace_relus(net, "1", example=torch.rand(3, 10, 12))
    assert [s.channels for s in relu_sites(net, example=torch.rand(1, 3, 10, 12))] == [10, 4]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.r, self.b, self.act = conv(), nn.ReLU(), conv(), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.r(self.a(x))) + x)


class Alone(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Beside(Alone):
    """A block and the attention in front of it."""

    def __init__(self, inner):
        super().__init__(inner)
        self.gate = conv(kernel=1)

    def forward(self, x):
        return self.inner(x * torch.sigmoid(self.gate(x)))


def checkpointed(block):
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper.checkpoint_wrapper(block)


def same(block):
    return block


WRAPPED = {
    "none": (same,),
    "checkpoint": (checkpointed,),
    "twice": (lambda b: Alone(checkpointed(b)),),
    "compiled": (lambda b: torch.compile(b, backend="eager"),),
    "attention": (Beside,),
    "some": (Beside, same, Alone),
    "attention around a checkpoint": (lambda b: Beside(checkpointed(b)), same),
}


@pytest.mark.parametrize("holder", [nn.Sequential, lambda *blocks: nn.Sequential(Blocks(blocks))])
@pytest.mark.parametrize("wrappers", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_change_no_label(wrappers, holder):
    kinds = iter(wrappers * 6)
    stages = [holder(*(next(kinds)(Residual()) for _ in range(n))) for n in (2, 1, 3)]
    net = nn.Sequential(conv(3), *stages)
    labels = [s.label for s in relu_sites(net) if s.label]
    assert labels == ["G1.B1", "G1.B2", "G2.B1", "G3.B1", "G3.B2", "G3.B3"]
    (name,) = replaced_in(net, "G2.B1")
    assert name.startswith("2.")
    assert name.endswith(".act")


class Blocks(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class OneByOne(nn.Module):
    """A stage whose blocks are attributes, one in the first stage, two in the others (RegNet)."""

    def __init__(self, count):
        super().__init__()
        for i in range(count):
            setattr(self, f"b{i}", Residual())

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


def test_a_stage_of_one_block_is_no_wrapper():
    net = nn.Sequential(conv(3), OneByOne(1), OneByOne(2), OneByOne(1))
    assert [s.label for s in relu_sites(net) if s.label] == ["G1.B1", "G2.B1", "G2.B2", "G3.B1"]


class ShortcutLast(nn.Module):
    """The shortcut, which has its own ReLU, is computed after the rest; nothing follows the addition."""

    def __init__(self):
        super().__init__()
        self.act1, self.conv1, self.act2, self.conv2 = nn.ReLU(), conv(), nn.ReLU(), conv()
        self.shortcut = nn.Sequential(nn.ReLU(), conv(kernel=1))

    def forward(self, x):
        h = self.conv2(self.act2(self.conv1(self.act1(x))))
        return h + self.shortcut(x)


class ShortcutFirstOperand(ShortcutLast):
    def forward(self, x):
        h = self.conv2(self.act2(self.conv1(self.act1(x))))
        return self.shortcut(x).add(h)


class TwoSums(ShortcutLast):
    def forward(self, x):
        h = self.conv2(self.act2(self.conv1(self.act1(x)) + x))
        return h + self.shortcut(x)


@pytest.mark.parametrize("block", [ShortcutLast, ShortcutFirstOperand, TwoSums])
def test_a_shortcut_holds_no_last_call(block):
    assert replaced_in(two_blocks(block), "G1.B*") == ["1.0.act2", "1.1.act2"]


class Pyramid(nn.Module):
    """Two levels are added that begin at a map which the block has computed: neither is a shortcut."""

    def __init__(self):
        super().__init__()
        self.down, self.act1, self.low, self.act2 = (
            conv(),
            nn.ReLU(),
            nn.Sequential(conv(), conv()),
            nn.ReLU(),
        )
        self.level, self.act3, self.pooled, self.act4 = conv(), nn.ReLU(), conv(kernel=1), nn.ReLU()

    def forward(self, x):
        pooled = self.act4(self.pooled(x))
        h = self.act1(self.down(x))
        h = self.act2(self.low(h)) + self.act3(self.level(h))
        return h + pooled


def test_a_level_of_a_pyramid_is_no_shortcut():
    assert replaced_in(two_blocks(Pyramid), "G1.B*") == ["1.0.act3", "1.1.act3"]


class Deep(nn.Module):
    """Halved in each group: of 16 pixels one is left in the last."""

    def __init__(self):
        super().__init__()
        self.a, self.act1, self.b, self.act2 = nn.Conv2d(C, C, 3, 2, 1), nn.ReLU(), conv(), nn.ReLU()
        self.down = nn.Conv2d(C, C, 1, 2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(kernel=1), nn.ReLU(), conv(kernel=1))

    def forward(self, x):
        h = self.act1(self.a(x))
        h = self.act2(self.b(h) + self.down(x))
        return h * torch.sigmoid(self.gate(h))


@pytest.mark.parametrize("size", [16, 24, 33, 64, (16, 40)])
def test_labels_do_not_depend_on_the_size_of_the_example(size):
    net = nn.Sequential(
        conv(3), *(nn.Sequential(Deep()) for _ in range(4)), nn.AdaptiveAvgPool2d(1), conv(kernel=1)
    )
    height, width = size if isinstance(size, tuple) else (size, size)
    sites = relu_sites(net, example=torch.rand(2, 3, height, width))
    assert [(s.label, s.name) for s in sites] == [
        *((f"G{g}.B1", f"{g}.0.act2") for g in range(1, 5)),
        *(("", f"{g}.0.act1") for g in range(1, 5)),
    ]


@pytest.mark.parametrize(
    ("sites", "places"),
    [("a", ["a"]), ("e", ["e"]), ("[ace]", ["a", "c", "e"]), ("body.*", ["body.0", "body.1"])],
)
def test_one_relu_at_several_places_of_a_sequential(sites, places):
    act, twin = nn.ReLU(inplace=True), nn.ReLU()
    body = nn.Sequential(twin, twin)
    layers = {"x": conv(3), "a": act, "b": conv(), "c": act, "body": body, "d": conv(), "e": act}
    net = nn.Sequential(OrderedDict(layers)).eval()
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    assert replaced_in(net, sites) == places
    assert not torch.equal(net(x), before)
    assert [type(net.get_submodule(n)) for n in ("a", "c", "e") if n not in places] == [nn.ReLU] * (
        3 - len({*places} & {*"ace"})
    )
    assert torch.equal(restore_relus(net)(x), before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        lambda m: nn.DataParallel(nn.DataParallel(m)),
    ],
)
def test_a_relu_that_is_compiled_or_wrapped_by_itself(wrap):
    net = nn.Sequential(conv(3), wrap(nn.ReLU()), conv(), nn.ReLU())
    assert [(s.name, s.edit) for s in relu_sites(net)] == [("1", "swap"), ("3", "swap")]
    assert replaced_in(net, "1") == ["1"]
    assert not isinstance(restore_relus(net)[1], SwishReLU)


class Late(nn.Module):
    """What is registered first runs last."""

    def __init__(self, first, body):
        super().__init__()
        self.first, self.body = first, body

    def forward(self, x):
        x = self.body(x)
        return self.first(x.mean((2, 3))[..., None] if isinstance(self.first, nn.Conv1d) else x)


@pytest.mark.parametrize(
    "net",
    [
        Late(conv(C, 2), nn.Sequential(conv(1), nn.ReLU())),
        Late(nn.Conv1d(C, 2, 1), nn.Sequential(conv(4), nn.ReLU())),
        Late(conv(C, 2), nn.Sequential(nn.Conv2d(4, C, 3, groups=2), nn.ReLU())),
        Late(conv(C, 2), nn.Sequential(nn.ConvTranspose2d(5, C, 2), nn.ReLU())),
    ],
)
def test_the_example_is_that_of_the_convolution_that_runs_first(net):
    assert [(s.name, s.channels) for s in relu_sites(net)] == [("body.1", C)]


class Plain(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.a, self.call = conv(), call

    def forward(self, x):
        return self.call(self.a(x) + x)


@pytest.mark.parametrize("call", [torch.ops.aten.relu, torch.ops.aten.relu.default])
def test_an_operator_is_seen_too(call):
    assert [s.label for s in relu_sites(two_blocks(lambda: Plain(call)))] == ["G1.B1", "G1.B2"]


class Optional(Block):
    def forward(self, x):
        h = self.last(F.relu(self.first(x))) + x
        if self.act is not None and isinstance(self.act, nn.Module):
            h = self.act(h)
        return h


class OptionalInOneLine(Block):
    def forward(self, x):
        h = self.last(F.relu(self.first(x))) + x
        return self.act(h) if self.act else h


@pytest.mark.parametrize("block", [Optional, OptionalInOneLine])
def test_to_ask_for_an_activation_is_not_to_call_it(block):
    assert replaced_in(two_blocks(block)) == ["1.1.act"]


class Deep1(Block):
    late = False

    def finish(self, h):
        return self.polish(h)

    def polish(self, h):
        return torch.relu(h)

    def forward(self, x):
        h = x + self.last(self.act(self.first(x)))
        return self.finish(h) if self.late else h


class GivenAway(Deep1):
    def forward(self, x):
        h = x + self.last(self.act(self.first(x)))
        if self.late:
            h = torch.utils.checkpoint.checkpoint(self.polish, h, use_reentrant=False)
        return h


@pytest.mark.parametrize("block", [Deep1, GivenAway])
def test_a_helper_of_a_helper_may_call_the_last_one(block):
    with pytest.raises(SiteError, match="calls ReLU too"):
        replaced_in(two_blocks(block))
