"""The surgery: which ReLU calls a network has, and how each becomes another activation."""

from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from sparta_act.surgery.sites import Site

__all__ = ["Site", "relu_sites", "replace_relus", "restore_relus"]
