"""The SPARTA modules of a network, by name and by site, and the inputs of their gates."""

from functools import partial

import torch
from torch import Tensor, nn

from sparta_act import Sparta, SpartaSet


def gates(model: nn.Module) -> dict[str, Sparta]:
    """The SPARTA modules of a network by their dotted names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Sparta)}


@torch.no_grad()
def gate_inputs(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Inputs of each SPARTA for images x (N, C, H, W), one of each call, by module name.

    One pass in evaluation mode; the modes are restored.
    """
    found: dict[str, list[Tensor]] = {}
    modes = [(m, m.training) for m in model.modules()]
    handles = []
    try:
        for name, sparta in gates(model).items():
            calls = found[name] = list[Tensor]()
            handles.append(sparta.register_forward_pre_hook(partial(_append_input, calls)))
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode
    return found


def _append_input(calls: list[Tensor], _: nn.Module, inputs: tuple[Tensor]) -> None:
    calls.append(inputs[0].clone())


def activations_of(model: nn.Module) -> dict[str, Sparta]:
    """The SPARTA modules of a network by the labels of a set of it; none where there is none."""
    return dict(SpartaSet.of(model)) if gates(model) else {}


def round_to_half(activations: dict[str, Sparta]) -> None:
    """Round every floating-point number of the activations to float16, in place, as a set stores them."""
    for module in activations.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half().float()
