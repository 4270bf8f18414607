"""What users give as the new activation, and as the sites."""

import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sparta_act import Sparta, SwishReLU, relu_sites, replace_relus
from sparta_act.errors import SiteError, WeightsError
from sparta_act.surgery.making import maker_of
from tests.helpers import nets
from tests.package.test_surgery import Probe, assert_untouched, state


class Plain(nn.Module):
    """Without a constructor of its own."""

    def forward(self, x):
        return x.relu()


class WithFlag(nn.Module):
    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.relu()


class WithCount(Probe):
    def __init__(self, num_features=3, slope=0.5):
        super().__init__(num_features)


class Anything(Probe):
    def __init__(self, *args):
        super().__init__(*args)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (Sparta, "Sparta(4, "),
        (functools.partial(Sparta, hidden=32), "Sparta(4, hidden=32; "),
        (functools.partial(Sparta, identity=True), "Sparta(4, hidden=8, identity=True; "),
        (lambda channels: Sparta(channels, hidden=9), "Sparta(4, hidden=9; "),
        (lambda channels=7: Probe(channels), "Probe()"),
        (lambda: nn.CELU(0.5), "CELU(alpha=0.5)"),
        (nn.SiLU, "SiLU()"),
        (nn.GELU, "GELU(approximate='none')"),
        (nn.LeakyReLU, "LeakyReLU(negative_slope=0.01)"),
        (nn.Softplus, "Softplus(beta=1.0, threshold=20.0)"),
        (nn.RReLU, "RReLU("),
        (nn.PReLU, "PReLU(num_parameters=4)"),
        (functools.partial(nn.LeakyReLU, 0.3), "LeakyReLU(negative_slope=0.3)"),
        (functools.partial(nn.SiLU, inplace=False), "SiLU()"),
        (functools.partial(functools.partial(nn.PReLU), init=0.1), "PReLU(num_parameters=4)"),
        (SwishReLU, "SwishReLU()"),
        (Plain, "Plain()"),
        (WithFlag, "WithFlag()"),
        (WithCount, "WithCount()"),
        (Anything, "Anything()"),
        (nn.GELU("tanh"), "GELU(approximate='tanh')"),
        (SwishReLU(), "SwishReLU()"),
    ],
)
def test_each_way_to_make_activations(activation, expected):
    net = replace_relus(nets.Net(nets.TwoModules), "G1.B*", activation)
    new = [block.act2 for block in net.layer1]
    assert [repr(m).startswith(expected) for m in new] == [True, True]
    assert new[0] is not new[1]
    assert new[0] is not activation
    if hasattr(new[0], "slope"):
        assert new[0].slope.shape == (4, 1, 1)
    assert not getattr(new[0], "inplace", False)  # the channel count is no flag


def test_the_name_or_folder_of_a_set(tmp_path):
    net = nets.Net(nets.TwoModules, width=16)  # 16 and 32 channels
    replace_relus(net, "G*.B2", "cifar10-resnet18-w16")
    expected = Sparta.from_pretrained("cifar10-resnet18-w16")
    for block, label in ((net.layer1[1], "G1.B2"), (net.layer2[1], "G2.B2")):
        assert block.act2.frozen
        assert torch.equal(block.act2.conv1, expected[label].conv1)
    expected.save_pretrained(tmp_path / "set")
    replace_relus(net, "G*.B1", str(tmp_path / "set"))
    assert torch.equal(net.layer2[0].act2.conv4, expected["G2.B2"].conv4)
    before = state(net)
    with pytest.raises(WeightsError, match="no-set"):
        replace_relus(net, "stem.2", str(tmp_path / "no-set"))
    assert_untouched(net, before)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_the_wide_set_fits_the_networks_that_it_is_for(library, name):
    make = pytest.importorskip(library)
    net = make.create_model(name) if library == "timm" else getattr(make, name)()
    replace_relus(net, "G*.B-1", "cifar10-resnet18")
    found = [(n, m) for n, m in net.named_modules() if isinstance(m, Sparta)]
    assert [m.in_channels for _, m in found] == [64, 128, 256, 512]
    assert all(m.frozen for _, m in found)
    assert [n.split(".")[0] for n, _ in found] == ["layer1", "layer2", "layer3", "layer4"]
    assert torch.isfinite(net.eval()(torch.rand(1, 3, 64, 64))).all()


def test_a_set_fits_by_the_name_of_the_site_where_channels_are_equal():
    halves = {name: Sparta(4) for name in ("layer1.0.act1", "G1.B1", "stem.2")}
    for i, module in enumerate(halves.values()):
        nn.init.constant_(module.gain, i)
    net = replace_relus(nets.Net(nets.TwoModules), "G1.B1, stem.2, layer1.0.act1", halves)
    block = net.layer1[0]
    assert [m.gain.item() for m in (block.act1, block.act2, net.stem[2])] == [0, 1, 2]


def test_a_module_that_does_not_say_its_channels_fits_where_its_label_is():
    net = replace_relus(nets.Net(nets.TwoModules), "G1.B*", {"G1.B2": nn.SiLU(), "G1.B1": Sparta(4)})
    assert [type(b.act2).__name__ for b in net.layer1] == ["Sparta", "SiLU"]
    with pytest.raises(
        SiteError, match=r"G2\.B1 has 8 channels: none fits\nThe set has G1\.B2 with no in_channels"
    ):
        replace_relus(net, "G2.B1", {"G1.B2": nn.SiLU()})
    with pytest.raises(SiteError, match=r"G2\.B1 has 8 channels: none fits"):
        replace_relus(net, "G2.B1", {"G2.B1": Sparta(4)})


@pytest.mark.parametrize("name", ["all", "a, b", "{c}", " d ", "G1_B1"])
def test_a_site_of_the_list_is_meant_whatever_it_is_called(name):
    net = nn.Sequential(OrderedDict({"conv": nn.Conv2d(3, 4, 3), name: nn.ReLU(), "more": nn.ReLU()}))
    replace_relus(net, [s for s in relu_sites(net) if s.name == name], nn.SiLU)
    assert [type(m) for m in net] == [nn.Conv2d, nn.SiLU, nn.ReLU]


def test_sites_in_a_list():
    net = nets.Net(nets.TwoModules)
    wide = [site for site in relu_sites(net) if site.channels == 8]
    replace_relus(net, wide, SwishReLU)
    names = [n for n, m in net.named_modules() if isinstance(m, SwishReLU)]
    assert names == [f"layer2.{i}.act{k}" for i in (0, 1) for k in (1, 2)]
    replace_relus(net, (s for s in ["G1.B1", "stem.2, G1.B-1"]), nn.SiLU)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.SiLU)]
    assert names == ["stem.2", "layer1.0.act2", "layer1.1.act2"]
    sites = relu_sites(net)
    assert [s.edit for s in sites if s.activation is not None] == ["SiLU"] * 2 + ["SwishReLU"] * 2 + [
        "SiLU"
    ] + ["SwishReLU"] * 2
    with pytest.raises(SiteError, match=r"stem\.2: stem\.2 cannot be replaced: it is replaced already"):
        replace_relus(net, [s for s in sites if s.name == "stem.2"])


def test_a_callable_whose_signature_nobody_knows_gets_the_channels():
    assert maker_of(Probe) is Probe
    made = maker_of(type("Odd", (), {"__call__": lambda self, c: Probe(c), "__signature__": 3})())
    assert made(5).in_channels == 5
