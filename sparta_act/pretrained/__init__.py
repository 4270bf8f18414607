"""Trained activations: sets of them, their files, and where they come from."""

from sparta_act.pretrained.sets import SpartaSet

__all__ = ["SpartaSet"]
