"""Refuses models that nothing can be replaced in."""

from torch import nn
from torch.nn.parameter import is_lazy

from sparta_act.errors import SiteError

CLOSED = {  # classes that nothing can be replaced in, and what to call them
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "FSDPModule",
    "ScriptModule": "ScriptModule",
    "ObserverBase": "module prepared for quantization",
    "FakeQuantizeBase": "module prepared for quantization",
    "WeightedQuantizedModule": "quantized module",
}


def check(model: nn.Module) -> None:
    """Refuse what cannot be operated on."""
    if not isinstance(model, nn.Module):
        raise SiteError(f"the model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        closed = [CLOSED[c.__name__] for c in type(module).__mro__ if c.__name__ in CLOSED]
        if closed:
            raise SiteError(
                f"{name or 'the model'} is a {closed[0]}: replace the ReLUs first, then make the "
                "optimizer, then script, compile, quantize or wrap the model."
            )
    check_values(model)


def check_values(model: nn.Module) -> None:
    """Refuse parameters and buffers without values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise SiteError(
                f"{name} has no values yet (a lazy or meta tensor): run the module once on an input, or "
                "move it with to_empty() and load its weights; then replace the ReLUs."
            )
