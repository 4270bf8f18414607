"""A torchvision ResNet-18 trained on CIFAR-10 without attacks: the network that a user already has."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from examples.models import Normalize
from examples.paper.attacks.robust_error import clean_errors
from examples.paper.common import data
from examples.paper.common.atomic import atomic_write
from examples.paper.common.statistics import format_error
from examples.paper.controls.experiment import Images, trained
from examples.paper.evaluation.networks import check_tensors

CIFAR = data.DATASETS["cifar10"]


def fresh() -> nn.Module:
    """torchvision's ResNet-18 for images of 32 x 32 in [0, 1]: without its max pool, for ten classes."""
    from torchvision.models import resnet18

    network = resnet18(num_classes=len(CIFAR.classes))
    network.maxpool = nn.Identity()
    return nn.Sequential(Normalize(CIFAR.mean, CIFAR.std), network)


def load(path: Path) -> nn.Module:
    """The network that `pretrain` wrote, its classifier new. Raises `ValueError` if there is none."""
    if not path.exists():
        raise ValueError(
            f"there is no {path}; make it with: python -m examples.paper controls pretrain --data "
            f"DATA/cifar10 --trained {path}"
        )
    network = fresh()
    try:
        state = load_file(path)
        check_tensors(state, network.state_dict(), torch.float32)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a network of `controls pretrain`: {error}") from None
    network.load_state_dict(state | {k: v for k, v in network.state_dict().items() if k.startswith("1.fc.")})
    return network


def pretrain(train: Images, test: Images, path: Path, epochs: int, lr: float) -> None:
    """Train it by the recipe of the experiments without its attack, write it, and print its clean error.

    Raises `ValueError` or `OSError` before the training if `path` is not a new file that can be written.
    """
    if path.exists() or path.suffix != ".safetensors":
        raise ValueError(f"--trained {path} must be a new file, NAME.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"steps": 0, "dataset": "cifar10", "seed": 0, "epochs": epochs, "batch_size": 128, "lr": lr}
    torch.manual_seed(0)
    with atomic_write(path) as scratch:
        network = trained(fresh(), *train, options).eval()
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, scratch)
    wrong = clean_errors(network, data.to_float(test[0]), test[1])
    print(f"written: {path}; its clean error is {format_error(wrong)}")
