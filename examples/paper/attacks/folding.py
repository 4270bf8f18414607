"""Batch norm folded into the convolution before it: a faster copy of a network in evaluation mode."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.hooks import RemovableHandle

TOLERANCE = 1e-4  # of the logits, relative to the largest; float32 rounds about a hundred times below


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of the network in evaluation mode without its batch norms, or the network itself.

    A norm is folded if it alone reads the output of one `Conv2d` and both run once, by the autograd graph of
    one pass. The copy is returned only if its logits for x are those of the network. The network itself is
    returned if nothing can be folded, or if it has hooks, is compiled or cannot be copied. Other parameters
    are shared. Convolutions of the copy run in channels_last, the faster layout. Control flow that depends on
    the images is not detected.

    Call it inside `attacking(model)`. Shapes: x (N, C, H, W); two images are enough.
    """
    try:
        if not all(_plain(m) for m in model.modules()):
            return model
        with (
            torch.random.fork_rng([x.device] if x.is_cuda else []),
            torch.autocast(x.device.type, enabled=False),  # too coarse to compare logits
        ):
            twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            if {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}:
                return model  # some modules copy as themselves
            pairs, answer = _pairs(twin.eval(), x)
            with torch.no_grad():
                for conv, norm in pairs:
                    _fold(twin, conv, norm)
                return twin if pairs and _same(twin(x.clone()), answer) else model
    except Exception:  # folding only saves time: no error of an unusual network stops the attack
        return model


def _plain(module: nn.Module) -> bool:
    """Whether the module has no hooks and is not compiled."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and module._compiled_call_impl is None and "_orig_mod" not in module._modules


def _pairs(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of each convolution and of the norm that alone reads its output; and the logits."""
    runs: list[tuple[str, nn.Module, Node]] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda m, inputs, y: runs.append((name, m, y.grad_fn)))

    handles = [
        watch(name, m)
        for name, m in model.named_modules()
        if type(m) in (nn.Conv2d, nn.BatchNorm2d) and not m.training and "forward" not in m.__dict__
    ]
    try:
        with torch.enable_grad():
            answer = model(x.detach().requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(name for name, _, _ in runs)
    convs = {node: name for name, m, node in runs if type(m) is nn.Conv2d and calls[name] == 1}
    readers = _readers(answer.grad_fn)
    pairs = []
    for name, m, node in runs:
        before = node.next_functions[0][0] if node is not None and node.next_functions else None
        alone = before in convs and readers[before] == 1 and readers[node] > 0
        if type(m) is nn.BatchNorm2d and m.running_mean is not None and calls[name] == 1 and alone:
            pairs.append((convs[before], name))
    return pairs, answer.detach()


def _readers(last: Node) -> "Counter[Node]":
    """Number of operations that read the result of each node of the graph that ends in `last`."""
    readers, waiting, seen = Counter([last]), [last], {last}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                readers[node] += 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    return readers


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), weight.requires_grad)
    parent, _, child = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
