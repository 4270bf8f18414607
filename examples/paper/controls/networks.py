"""Trained networks with other activations, or with their gates replaced by means."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from examples.paper.audit.adaptive import FixedGate, mean_of_gates, replaced
from examples.paper.common.gates import gate_inputs, gates
from examples.paper.common.models import ACTIVATIONS
from examples.paper.controls.experiment import Make
from sparta_act import Sparta, replace_relus

SITES = "G*.B-1"


def drop_in(trained: nn.Module, seed: int) -> dict[str, Make]:
    """The trained network by what replaces its ReLUs."""

    def changed(name: str, sites: str) -> Make:
        def make() -> nn.Module:
            torch.manual_seed(seed)
            return replace_relus(copy.deepcopy(trained), sites, ACTIVATIONS[name])

        return make

    return {
        "ReLU": lambda: copy.deepcopy(trained),
        "SPARTA": changed("sparta", SITES),
        "SPARTA, identity=True": changed("sparta-identity", SITES),
        "SiLU": changed("silu", "*act*"),
    }


def mean_gate(trained: nn.Module, x: Tensor) -> dict[str, Make]:
    """The trained network by what replaces its gates: means over active elements of images x, else one half.

    In each, and in the network itself, the statistics of batch norm are estimated anew on x: those of the
    network with its gates fit no other.
    Raises `ValueError` for a gate that is not called exactly once, or is the whole network.
    """
    calls = gate_inputs(trained, x)
    if odd := [
        f"{name or 'the network itself'} {len(inputs)} times"
        for name, inputs in calls.items()
        if len(inputs) != 1 or not name
    ]:
        raise ValueError(f"each gate must be a submodule that is called once; called: {', '.join(odd)}")
    sites = gates(trained)
    with torch.no_grad():
        seen = {n: (sites[n].attention(z), (z > 0).float()) for n, (z,) in calls.items()}  # gate and active

    def changed(substitute: Callable[[str, Sparta], nn.Module]) -> Make:
        def make() -> nn.Module:
            model = replaced(trained, substitute)
            update_bn([x], model)
            return model

        return make

    def fixed(dims: tuple[int, ...]) -> Make:
        def mean(name: str, _: Sparta) -> FixedGate:
            return FixedGate(mean_of_gates([seen[name]], dims))

        return changed(mean)

    return {
        "SPARTA": changed(lambda _, sparta: sparta),
        "one number": fixed((0, 1, 2, 3)),
        "one of each channel": fixed((0, 2, 3)),
        "one of each place of a channel": fixed((0,)),
    }
