"""SPARTA, a spatially attentive and adversarially robust activation, as a plug-in for PyTorch CNNs."""

from sparta_act.activations import Sparta, SwishReLU
from sparta_act.errors import SpartaError
from sparta_act.pretrained import SpartaSet, list_sets
from sparta_act.surgery import relu_sites, replace_relus, restore_relus

__all__ = [
    "Sparta",
    "SpartaError",
    "SpartaSet",
    "SwishReLU",
    "list_sets",
    "relu_sites",
    "replace_relus",
    "restore_relus",
]
__version__ = "0.1.0.dev0"
