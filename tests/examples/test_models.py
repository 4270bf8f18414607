import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import models
from examples.paper.evaluation import networks
from tests.examples.conftest import EXAMPLES

RELU, SPARTA = (EXAMPLES / "networks" / f"cifar10-resnet18-w16{s}.safetensors" for s in ("-relu", ""))


@pytest.mark.parametrize("path", [RELU, SPARTA])
def test_a_shipped_network_is_the_one_that_the_laboratory_loads(path):
    x, mine = torch.rand(2, 3, 32, 32), models.load_network(path)
    assert not mine.training
    assert torch.equal(mine(x), networks.load(str(path))[0](x))


def test_weights_load_strictly(tmp_path):
    state = load_file(RELU)
    wrong = {
        "missing": {k: v for k, v in state.items() if k != "fc.bias"},
        "extra": state | {"fc.more": torch.zeros(1)},
        "shape": state | {"fc.bias": torch.zeros(11)},
    }
    model = models.ResNet18(16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, tensors in wrong.items():
        save_file(tensors, tmp_path / name)
        key = "fc.more" if name == "extra" else "fc.bias"
        with pytest.raises(ValueError, match=f"is of another network: 1 tensors do not fit, such as {key}"):
            models.load_weights(model, tmp_path / name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"is not a ResNet-18 of examples/networks; its settings are \{\}"):
        models.load_network(tmp_path / "shape")
    with pytest.raises(ValueError, match="cannot read"):
        models.load_network(EXAMPLES / "data" / "README.md")
    with pytest.raises(ValueError, match="cannot read"):
        models.load_network(tmp_path / "none")


@pytest.mark.parametrize(
    "changed", [{"activation": "silu"}, {"dataset": "mnist-m"}, {"activation": None}, {"dataset": None}]
)
def test_weights_of_another_activation_or_data_set_are_refused(changed, tmp_path):
    """Their tensors have the same names and shapes."""
    settings = {
        "arch": "resnet18",
        "activation": "relu",
        "sites": "G*.B-1",
        "width": 16,
        "dataset": "cifar10",
    }
    settings = {key: value for key, value in (settings | changed).items() if value is not None}
    path = tmp_path / "other.safetensors"
    save_file(load_file(RELU), path, {"settings": json.dumps(settings)})
    with pytest.raises(ValueError, match="is not a ResNet-18 of examples/networks; its settings are"):
        models.load_network(path)
    with pytest.raises(ValueError, match=r"is of another network, .*: give one with ReLU, for CIFAR-10"):
        models.make_network("resnet18", 10, init=str(path))


@pytest.mark.parametrize("settings", ["[1]", "7", "{", '{"arch": "resnet18"}'])
def test_settings_that_are_none_are_refused(settings, tmp_path):
    save_file(load_file(RELU), tmp_path / "bad", {"settings": settings})
    with pytest.raises(ValueError, match=r"cannot read|is not a ResNet-18 of examples/networks"):
        models.load_network(tmp_path / "bad")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_a_network_of_a_library_normalizes_inside_and_starts_from_weights(name, tmp_path):
    pytest.importorskip(name.partition("/")[0])
    first = models.make_network(name, 3).eval()
    save_file({k: v.contiguous() for k, v in first[1].state_dict().items()}, tmp_path / "w.safetensors")
    second = models.make_network(name, 3, init=str(tmp_path / "w.safetensors")).eval()
    x = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(second(x), first[1]((x - mean) / std))
    third = models.make_network(name, 5, init=str(tmp_path / "w.safetensors")).eval()  # of other classes
    assert third(x).shape == (1, 5)
    new = {k for k, v in third.state_dict().items() if not torch.equal(v, first.state_dict()[k])}
    assert new == {"1.fc.weight", "1.fc.bias"}
    broken = {k: v.contiguous() for k, v in first[1].state_dict().items()} | {"fc.bias": torch.zeros(5)}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors do not fit, such as fc\.bias"):
        models.make_network(name, 3, init=str(tmp_path / "broken.safetensors"))
