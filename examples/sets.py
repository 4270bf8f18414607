"""SPARTA of a trained network, as a set stores it."""

from torch import nn

from sparta_act import Sparta


def gates(model: nn.Module) -> dict[str, Sparta]:
    """The network's SPARTA by their dotted names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Sparta)}


def activations_of(model: nn.Module) -> dict[str, Sparta]:
    """Activations of a network of `models.py` by their label: `layer1.1.act2` is at G1.B2."""
    found = {}
    for name, module in gates(model).items():
        group, block, _ = name.removeprefix("layer").split(".")
        found[f"G{group}.B{int(block) + 1}"] = module
    return found


def round_to_half(activations: dict[str, Sparta]) -> None:
    """Round every floating number of the activations, in place, to what float16 holds."""
    for module in activations.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half().float()
