"""The examples of docs/recipes.md run, with the libraries that they are for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparta_act import Sparta, SpartaSet, SwishReLU

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
BEGINNING, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of the libraries


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """What the examples have at hand: the beginning of the page, with a weaker attack, and a few images."""
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs there
    scope = {"__name__": "recipes"}
    exec(BEGINNING, scope)
    scope["ATTACK"]["steps"] = 1
    scope["x"], scope["y"] = torch.rand(4, 3, 64, 64), torch.tensor([3, 1, 4, 1])
    scope["loader"] = DataLoader(TensorDataset(scope["x"], scope["y"]), 2)
    return scope


def run(line, scope):
    """Run the example with this line."""
    (block,) = (b for b in BLOCKS if line in b)
    exec(block, scope)


@pytest.mark.parametrize("loop", ["loss.backward()", "import Accelerator", "import lightning"])
def test_the_training_loops_train_the_activations(loop, scope):
    if "import" in loop:
        pytest.importorskip(loop.split()[1].lower().replace("accelerator", "accelerate"))
    made = []
    make = scope["make_network"]
    scope["make_network"] = lambda: made.append(make()) or made[-1]
    run(loop, scope)
    (net,) = made
    activations = [m for m in net.modules() if isinstance(m, Sparta)]
    assert [m.in_channels for m in activations] == [64, 128, 256, 512]
    assert all(m.gain != 1 and m.gain.isfinite() for m in activations)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "pyautoattack"])
def test_attacks_of_other_libraries_see_the_gradient(library, scope):
    """They break a network with frozen activations whose answers were right, within the bound."""
    pytest.importorskip(library)
    net = scope["net"] = scope["make_network"]()
    SpartaSet.of(net).freeze()
    x = scope["x"]
    y = scope["y"] = net.eval()(x).argmax(1)
    run(library, scope)
    attacked = scope["attacked"]
    assert (attacked - x).abs().max() <= 8 / 255 + 1e-6
    assert (attacked - x).abs().mean() > 5 / 255, "steps that are too small"
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (net(attacked).argmax(1) != y).all()


def test_builders_take_the_activation_that_needs_no_channels(scope, monkeypatch):
    timm, torchvision = pytest.importorskip("timm"), scope["torchvision"]
    made = []
    for owner, name in (
        (timm, "create_model"),
        (torchvision.models, "regnet_y_400mf"),
        (torchvision.ops, "Conv2dNormActivation"),
    ):
        build = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, build=build, **k: made.append(build(*a, **k)) or made[-1])
    run("act_layer=SwishReLU", scope)
    assert len(made) == 3
    for net in made:
        kinds = {type(m) for m in net.modules()}
        assert SwishReLU in kinds
        assert nn.ReLU not in kinds or net is made[1]  # whose squeeze-and-excite has its own


def test_every_relu_of_a_network_by_a_builder(scope):
    scope["timm"] = pytest.importorskip("timm")
    run('"all"', scope)
    assert sum(isinstance(m, Sparta) for m in scope["net"].modules()) == 17
