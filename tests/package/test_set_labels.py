"""`SpartaSet.of`: the activations of an edited network as a set, and under which labels."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparta_act import Sparta, SpartaSet, replace_relus, restore_relus
from sparta_act.errors import WeightsError


def put_by_hand():
    """A network with a ReLU and two Spartas."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Sparta(4, hidden=1), nn.Conv2d(4, 6, 9), nn.ReLU())
    net.add_module("act", Sparta(6, hidden=1))
    return net


def edited(labels=("G1.B2", "act")):
    """The same, as the surgery leaves it."""
    net = put_by_hand()
    for module, label in zip((net[1], net.act), labels, strict=True):
        module.sparta_site = label
    return net


def two_backbones():
    return nn.ModuleDict({"left": edited(), "right": edited(("G1.B2", "G4.B2"))})


@pytest.mark.parametrize(
    ("build", "labels"),
    [
        (put_by_hand, {"1": "1", "act": "act"}),
        (edited, {"1": "G1.B2", "act": "act"}),
        (
            two_backbones,
            {"left.1": "left.1", "left.act": "act", "right.1": "right.1", "right.act": "G4.B2"},
        ),
        (lambda: edited(("act", "act")), {"1": "1", "act": "act"}),
        (lambda: edited(("act", "")), {"1": "1", "act": "act"}),
        (lambda: Sparta(4), {"": "sparta"}),
    ],
)
def test_labels_are_those_of_the_sites_or_dotted_names(build, labels):
    net = build()
    found = SpartaSet.of(net)
    assert list(found) == list(labels.values())
    for name, label in labels.items():
        assert found[label] is net.get_submodule(name)


def test_an_activation_that_was_removed_has_no_label_elsewhere():
    net = replace_relus(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()), "1")
    used = net[1]
    restore_relus(net)[3] = used
    assert list(SpartaSet.of(net)) == ["3"]


def test_a_dotted_name_that_is_the_label_of_another_is_no_label():
    """Three share what they are called, by a site or by a name, in a circle."""
    net = nn.ModuleDict({"y": Sparta(2), "b": Sparta(2), "c": Sparta(2)})
    for name, label in (("y", "x"), ("b", "x"), ("c", "y")):
        net[name].sparta_site = label
    found = SpartaSet.of(net)
    assert list(found) == ["y", "b", "c"]
    assert all(found[name] is net[name] for name in net)


def compiled_inside(net):
    net[1] = torch.compile(net[1], backend="eager")
    return net


def distributed(net):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net)
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS = [
    nn.DataParallel,
    lambda net: torch.compile(net, backend="eager"),
    lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    lambda net: AveragedModel(nn.DataParallel(net)),
    compiled_inside,
    distributed,
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("build", [put_by_hand, edited, two_backbones])
def test_a_wrapper_changes_no_label(wrap, build):
    net = build()
    labels = list(SpartaSet.of(net))
    if wrap is compiled_inside and build is two_backbones:
        net["left"] = wrap(net["left"])
    else:
        net = wrap(net)
    assert list(SpartaSet.of(net)) == labels


def test_a_child_called_module_is_no_wrapper():
    assert list(SpartaSet.of(nn.ModuleDict({"module": put_by_hand()}))) == ["module.1", "module.act"]


def test_a_module_in_two_places_is_there_once():
    act = Sparta(4)
    assert list(SpartaSet.of(nn.Sequential(act, nn.ReLU(), act))) == ["0"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Sequential(nn.ReLU()), r"no Sparta in this Sequential: put some in with replace_relus\("),
        ({"G1.B2": Sparta(2)}, "takes a network, an nn.Module, not a dict"),
    ],
)
def test_what_makes_no_set_is_refused(given, words):
    with pytest.raises(WeightsError, match=words):
        SpartaSet.of(given)


def narrow(channels):
    return Sparta(channels, hidden=1)


@pytest.mark.parametrize(
    "wrap", [lambda net: net, nn.DataParallel, lambda net: torch.compile(net, backend="eager")]
)
def test_a_set_goes_back_to_the_sites_that_it_came_from(tmp_path, wrap):
    """Labels of blocks and dotted names break ties: both sites of a pair have the same channels."""
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    net, sites = wrap(resnet18(num_classes=5)), "relu, G1.B1, G2.B1, G2.B2"
    replace_relus(net, sites, narrow)
    with torch.no_grad():
        for m in net.modules():
            for p in m.parameters() if isinstance(m, Sparta) else ():
                p.copy_(torch.randn(p.shape).half())
    trained = SpartaSet.of(net, {"backbone": "ResNet-18"})
    assert list(trained) == ["relu", "G1.B1", "G2.B1", "G2.B2"]
    trained.save_pretrained(tmp_path)
    other = resnet18(num_classes=5)
    replace_relus(other, sites, str(tmp_path))
    for label, activation in SpartaSet.of(other).items():
        assert activation.frozen
        for one, two in zip(activation.parameters(), trained[label].parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_set_of_names_given_by_hand_fits_back_in(tmp_path):
    net = put_by_hand()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape).half())
    SpartaSet.of(net, {"backbone": "by hand"}).save_pretrained(tmp_path)
    other = copy.deepcopy(net)
    other[1], other.act = nn.ReLU(), nn.ReLU()
    replace_relus(other, "1, act", Sparta.from_pretrained(tmp_path))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize("around", [nn.Sequential, lambda m: torch.compile(m, backend="eager")])
def test_the_site_of_a_module_around_it_is_its_label(around):
    net = nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU())
    replace_relus(net, "1", lambda channels: around(Sparta(channels, hidden=1)))
    assert list(SpartaSet.of(nn.ModuleDict({"net": net}))) == ["1"]
