"""Batch norm folded into the convolution before it: the same network in evaluation mode, with less to do."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4  # of the answers, relative to the largest: float32 rounds some hundred times below


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of the network, in evaluation mode, without its batch norms; or the network itself.

    A norm is folded if it reads what one `Conv2d` returns, both run once, and neither has hooks. The copy is
    returned only if it answers x as the network does; where nothing can be folded, the network cannot be
    copied or is compiled, it is returned as it is. All other parameters are shared with the network. Its
    convolutions run in channels_last, the faster layout.

    Shapes: x (N, C, H, W); one image is enough.
    """
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        return model  # the copy would be compiled again, or lose it
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # whose rounding is too coarse
            shared = {id(p): p for p in model.parameters()}
            twin = copy.deepcopy(model, shared).eval()
            pairs, answer = _pairs(twin, x)
            for conv, norm in pairs:
                _fold(twin, conv, norm)
            return twin if pairs and _same(twin(x), answer) else model
    except Exception:  # this only saves time: what a strange network raises here is no reason to stop
        return model


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), weight.requires_grad)
    parent, _, child = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())


def _pairs(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of each convolution and of the norm that reads its result; and the network's answer."""
    calls: dict[str, int] = {}
    results: dict[int, tuple[str, Tensor]] = {}  # alive, so that their ids stay their own
    found: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if type(module) is nn.Conv2d:
                results[id(result)] = name, result
            elif inputs and id(inputs[0]) in results:
                found.append((results[id(inputs[0])][0], name))

        return module.register_forward_hook(see)

    plain = [(n, m) for n, m in model.named_modules() if _plain(m)]
    handles = [watch(name, module) for name, module in plain]
    try:
        answer = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in found if all(calls[name] == 1 for name in pair)], answer


def _plain(module: nn.Module) -> bool:
    """Whether the module does what its class says and nothing else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False  # they may want to see what folding takes away
    if type(module) is nn.BatchNorm2d:
        return module.running_mean is not None
    return type(module) is nn.Conv2d


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
