"""Trained activations: sets of them, their files, and where they come from."""

from sparta_act.pretrained.folder import CARD, CONFIG, WEIGHTS
from sparta_act.pretrained.listing import check_files, list_sets
from sparta_act.pretrained.sets import SpartaSet

__all__ = ["CARD", "CONFIG", "WEIGHTS", "SpartaSet", "check_files", "list_sets"]
