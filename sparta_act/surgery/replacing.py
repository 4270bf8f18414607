"""Replaces ReLU calls of a network by another activation, and puts them back."""

import copy
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sparta_act.activations import Sparta
from sparta_act.errors import SiteError
from sparta_act.surgery.checking import check, check_values
from sparta_act.surgery.finding import SWAPPED, find_sites, inner
from sparta_act.surgery.grammar import select
from sparta_act.surgery.naming import parse_kinds
from sparta_act.surgery.rewriting import MARK, NAME, digest_of, original_class, rewritten
from sparta_act.surgery.sandbox import Example, Snapshot
from sparta_act.surgery.sites import Cut, Site, SiteList, shown
from sparta_act.surgery.verifying import answers, compare, verify

Activation = Callable[[int], nn.Module] | nn.ModuleDict


def relu_sites(model: nn.Module, *, kinds: str = "relu", example: Example | None = None) -> SiteList:
    """List the ReLU calls of `model` that `replace_relus` can replace; the model is left as it was.

    Blocks come first and have a label such as "G4.B2"; all other sites go by their dotted name.
    `kinds`: which activations count, "relu6" or several with commas, "relu, hardswish".
    `example` is an input of the network, a tensor, a tuple of arguments or a dict of named ones; by default
    small noise is tried. Raises `SiteError` for what cannot be run or operated on.

    >>> relu_sites(torchvision.models.resnet18())
    site   name             channels  calls  edit
    G1.B1  layer1.0         64        1      rewrite
    ...
           relu             64        1      swap
    """
    check(model)
    return shown(find_sites(inner(model), example, parse_kinds(kinds))[0])


def replace_relus(
    model: nn.Module,
    sites: str,
    activation: Activation = Sparta,
    *,
    kinds: str = "relu",
    example: Example | None = None,
) -> nn.Module:
    """Replace the ReLU calls at `sites`, in place and all or nothing; return the same model.

    `sites`: the last ReLU of blocks by group and block, "G4.B2", "G*.B-1", "G{1,2}.B*", or dotted names with
    shell wildcards, "features.*"; several with commas. `relu_sites` lists what there is.
    `activation`: a class or function from channel count to module, or a set of labelled activations with
    `in_channels`, of which copies are put where the channels fit (labels break ties).
    `kinds`: which activations are replaced, "relu6" or several with commas, "relu, hardswish".
    `example`: an input of the network, a tensor, a tuple of arguments or a dict of named ones; by default
    small noise is tried.

    Raises `SiteError` when anything does not fit; the model is then as it was.

    >>> replace_relus(resnet, "G*.B-1")
    """
    check(model)
    network = inner(model)
    _check_activation(activation)
    wanted = parse_kinds(kinds)
    found, example = find_sites(network, example, wanted)
    chosen = select(found, sites, wanted)
    new = (
        _matched(chosen, activation) if isinstance(activation, nn.ModuleDict) else _built(chosen, activation)
    )
    classes = [_class_for(site) for site in chosen]
    expected = answers(network, example)
    before = Snapshot(network)
    try:
        for site, module, cls in zip(chosen, new, classes, strict=True):
            _put(site.cut, module, cls)
        verify(network, chosen, new, example)
        compare(network, chosen, new, example, expected)
    except BaseException:
        before.restore()
        raise
    _forget_compiled()
    return model


def restore_relus(model: nn.Module) -> nn.Module:
    """Put back, in place, every ReLU that `replace_relus` has replaced in `model`; return the same model.

    Raises `SiteError` when there is none.
    """
    check(model)
    modules, found = list(model.modules()), False
    hidden = {type(m).__name__ for m in modules if MARK not in vars(type(m)) and hasattr(type(m), MARK)}
    if hidden:
        raise SiteError(
            f"asked to restore the ReLUs, but {sorted(hidden)} were given other classes since, as "
            "torch.nn.utils.parametrize does; undo that first. Nothing was changed."
        )
    for module in modules:
        for key, (_, new) in vars(module).get(SWAPPED, {}).items():
            if module._modules.get(key) is not new:
                raise SiteError(
                    f"asked to restore the ReLUs, but what was put at {key!r} of a {type(module).__name__} "
                    "is there no more: modules were inserted, removed or set since. Nothing was changed."
                )
    for module in modules:
        swapped = vars(module).pop(SWAPPED, {})
        for key, (relu, new) in swapped.items():
            module._modules[key] = relu
            relu.train(module.training)
            for like in (t for t in (*new.parameters(), *module.parameters()) if t.is_floating_point()):
                relu.to(like.device, like.dtype)  # where the network has been moved since
                break
        if MARK in vars(type(module)):
            module.__class__ = original_class(module)
            module._modules.pop(NAME, None)
            found = True
        found |= bool(swapped)
    if not found:
        raise SiteError("asked to restore the ReLUs, but none of this model is replaced.")
    _forget_compiled()
    return model


def _check_activation(activation: object) -> None:
    if isinstance(activation, nn.ModuleDict):
        return
    if isinstance(activation, nn.Module) or not callable(activation):
        raise SiteError(
            "activation must be a function from channel count to module, such as lambda channels: nn.GELU(), "
            f"or a set, such as Sparta.from_pretrained(...) returns; got {activation!r}"
        )
    if getattr(activation, "__module__", "") == "torch.nn.modules.activation" and activation is not nn.PReLU:
        name = getattr(activation, "__name__", "")
        raise SiteError(
            f"activation is called with the channel count, which is no argument of nn.{name}; give "
            f"lambda channels: nn.{name}()"
        )


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # torch 2.4 would run its old code: it does not see a new class
        torch.compiler.reset()


def _class_for(site: Site) -> type[nn.Module] | None:
    cut = site.cut
    cls = type(cut.target)
    if cut.spans and is_parametrized(cut.target):
        raise SiteError(
            f"{site} ({site.name}) is parametrized, which changes its class as this would; "
            "replace the ReLUs first. Nothing was changed."
        )
    return rewritten(cls, digest_of(cls), cut.spans) if cut.spans else None


def _built(sites: list[Site], activation: Callable[[int], nn.Module]) -> list[nn.Module]:
    try:
        new = [activation(site.channels) for site in sites]
    except TypeError as error:
        raise SiteError(
            f"activation is called with the channel count, which failed: {error}. For a module that takes "
            "none, give a function: lambda channels: SwishReLU(). Nothing was changed."
        ) from error
    for site, module in zip(sites, new, strict=True):
        if not isinstance(module, nn.Module):
            raise SiteError(f"activation({site.channels}) for {site} must be an nn.Module, got {module!r}")
        if isinstance(module, torch.jit.ScriptModule):
            raise SiteError(
                f"activation({site.channels}) for {site} is a ScriptModule, which cannot be watched"
            )
        check_values(module)
    if len({id(module) for module in new}) < len(new):
        raise SiteError(
            "activation must return a new module at each call, got the same one for several sites"
        )
    return [_like(site, module) for site, module in zip(sites, new, strict=True)]


def _matched(sites: list[Site], activations: nn.ModuleDict) -> list[nn.Module]:
    """A copy of the activation that fits each site by channels; among several, the one with its label."""
    labelled: dict[str, nn.Module] = dict(activations.items())
    channels = {label: getattr(module, "in_channels", None) for label, module in labelled.items()}
    new, problems = [], []
    for site in sites:
        fits = [label for label, count in channels.items() if count == site.channels]
        fits = [label for label in fits if label == site.label] or fits
        if len(fits) == 1:
            new.append(_like(site, copy.deepcopy(labelled[fits[0]])))
        else:
            problems.append(
                f"{site} has {site.channels} channels: {' and '.join(fits) + ' fit' if fits else 'none fits'}"
            )
    if problems:
        has = ", ".join(f"{label} with {count}" for label, count in channels.items())
        raise SiteError(
            "\n".join(["the activations do not fit the sites:", *problems, f"The set has {has}."])
        )
    return new


def _like(site: Site, module: nn.Module) -> nn.Module:
    """Give the module the device, dtype and training mode of the block."""
    cut = site.cut
    tensors = [t for t in (*cut.within.parameters(), *cut.within.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else cut.like
    module.to(cut.like.device, like.dtype)
    module.train(cut.within.training)
    return module


def _put(cut: Cut, module: nn.Module, cls: type[nn.Module] | None) -> None:
    if cls:
        cut.target.__class__ = cls
    else:
        swapped = vars(cut.target).setdefault(SWAPPED, {})
        swapped[cut.key] = cut.target._modules[cut.key], module
    cut.target._modules[cut.key] = module
