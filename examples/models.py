"""Networks for images in [0, 1]: a CIFAR ResNet-18, and those of torchvision and timm by name."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparta_act import replace_relus


class Normalize(nn.Module):
    """Zero mean and unit deviation, inside the network, so that attacks see images in [0, 1]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W), kept."""
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """For small images: `width` channels in the first group, twice as many in each that follows."""

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.normalize = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of CIFAR-10
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(width), nn.ReLU()
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(1, 5):
            first = BasicBlock(channels[i - 1], channels[i], 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, BasicBlock(channels[i], channels[i], 1)))
        self.fc = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) in [0, 1] -> (N, num_classes)."""
        h = self.act1(self.bn1(self.conv1(self.normalize(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(h.mean((2, 3)))


def make_network(name: str, num_classes: int, *, width: int = 16, init: str | None = None) -> nn.Module:
    """Network with ReLU, "resnet18" (the one above), "torchvision/NAME" or "timm/NAME", for images in [0, 1].

    `init`: a .safetensors file of that network's weights; a classifier for other classes stays new. Raises
    `ValueError` for what does not fit.
    """
    library, _, name_there = name.partition("/")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    if name == "resnet18":
        network = ResNet18(width, num_classes)
    elif library == "torchvision":
        from torchvision.models import get_model

        network = get_model(name_there, weights=None, num_classes=num_classes)
    elif library == "timm":
        import timm

        network = timm.create_model(name_there, num_classes=num_classes)
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    else:
        raise ValueError(f"no network {name!r}: known are resnet18, torchvision/NAME and timm/NAME")
    if init is not None:
        settings = settings_of(init)
        if settings and (settings.get("activation"), settings.get("dataset")) != ("relu", "cifar10"):
            raise ValueError(f"{init} is of another network, {settings}: give one with ReLU, for CIFAR-10")
        load_weights(network, init, but_classifier=True)
    return network if name == "resnet18" else nn.Sequential(Normalize(mean, std), network)


def load_network(path: str | Path) -> nn.Module:
    """A network of networks/, a `ResNet18` with its activation, in evaluation mode. Raises `ValueError`."""
    settings = settings_of(path)
    known = {"arch": ["resnet18"], "dataset": ["cifar10"], "activation": ["relu", "sparta"]}
    unlike = any(settings.get(key) not in values for key, values in known.items())
    if unlike or not {"width", "sites"} <= settings.keys():
        raise ValueError(f"{path} is not a ResNet-18 of examples/networks; its settings are {settings}")
    network: nn.Module = ResNet18(settings["width"])
    if settings["activation"] == "sparta":
        replace_relus(network, settings["sites"])
    return load_weights(network, path).eval()


def load_weights(network: nn.Module, path: str | Path, but_classifier: bool = False) -> nn.Module:
    """Load a file into `network`, which changes and is returned. Raises `ValueError` unless all keys fit.

    `but_classifier`: its last linear layer keeps its own weights if the file has another number of classes.
    """
    settings, own = settings_of(path), network.state_dict()
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    shapes = {(k, v.shape) for k, v in own.items()} ^ {(k, v.shape) for k, v in state.items()}
    wrong, linear = (
        {k for k, _ in shapes},
        [n for n, m in network.named_modules() if isinstance(m, nn.Linear)],
    )
    classifier = {k for n in linear[-1:] for k in (f"{n}.weight", f"{n}.bias") if k in own}
    if but_classifier and wrong == classifier <= state.keys():
        state |= {k: own[k] for k in classifier}
    elif wrong:
        raise ValueError(
            f"{path} is of another network{f', {settings}' if settings else ''}: "
            f"{len(wrong)} tensors do not fit, such as {min(wrong)}"
        )
    network.load_state_dict(state)
    return network


def settings_of(path: str | Path) -> dict[str, Any]:
    """The settings in a .safetensors file's metadata, if any. Raises `ValueError` for another file."""
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {}).get("settings", "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
