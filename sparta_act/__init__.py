"""SPARTA, a spatially attentive and adversarially robust activation, as a plug-in for PyTorch CNNs."""

__version__ = "0.1.0.dev0"
