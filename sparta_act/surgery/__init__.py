"""The surgery: which ReLU calls a network has, and how each becomes another activation."""

from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus

__all__ = ["relu_sites", "replace_relus", "restore_relus"]
