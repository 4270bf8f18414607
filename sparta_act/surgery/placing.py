"""Makes the new modules, and puts them at their sites."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from sparta_act.activations import PLACE
from sparta_act.errors import SiteError
from sparta_act.surgery.making import Make
from sparta_act.surgery.network import SWAPPED, like_swapped
from sparta_act.surgery.rewriting import Span, extended
from sparta_act.surgery.sites import Cut, Site


def check_values(model: nn.Module) -> None:
    """Refuse parameters and buffers without values."""
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (is_lazy(tensor) or tensor.is_meta):
                raise SiteError(
                    f"{name}{'.' if name else ''}{key} has no values yet (a lazy or meta tensor): run the "
                    "module once on an input, or move it with to_empty() and load its weights; then replace "
                    "the ReLUs"
                )


def build(sites: list[Site], make: Make | Mapping[str, nn.Module]) -> list[nn.Module]:
    """A module for each site, with the device and dtype of its input, and the mode of the block around it."""
    new = _matched(sites, make) if isinstance(make, Mapping) else _called(sites, make)
    for site, module in zip(sites, new, strict=True):
        vars(module)[PLACE] = str(site)
        like = site.cut.like
        module.to(like.device, like.dtype if like.dtype.is_floating_point else None)
        module.train(site.cut.within.training)
    return new


def classes_for(sites: list[Site]) -> dict[nn.Module, type[nn.Module]]:
    """The rewritten classes of the modules whose forward must change. Raises `SiteError`."""
    changes = dict[nn.Module, list[tuple[str, tuple[Span, ...]]]]()
    for site in sites:
        cut = site.cut
        if cut.spans and is_parametrized(cut.target):
            raise SiteError(
                f"{site} ({site.name}) is parametrized, which changes its class as this would; "
                "replace the ReLUs first"
            )
        if cut.spans:
            changes.setdefault(cut.target, []).append((cut.key, cut.spans))
    return {target: extended(type(target), tuple(sorted(new))) for target, new in changes.items()}


def put(cut: Cut, module: nn.Module) -> None:
    """Change the network: `module` becomes a child of the target."""
    old, cut.target._modules[cut.key] = cut.target._modules.get(cut.key), module
    if not cut.spans:
        like = like_swapped(cut.target, module)
        dtype = None if like is None else like.dtype
        vars(cut.target).setdefault(SWAPPED, {})[cut.key] = old, module, dtype


def _called(sites: list[Site], make: Make) -> list[nn.Module]:
    try:
        new = [make(site.channels) for site in sites]
    except TypeError as error:
        raise SiteError(
            f"activation is called with the channel count, which failed: {error}. For a module that takes "
            "other arguments, write a function: lambda channels: nn.Threshold(0.1, 0)"
        ) from error
    for site, module in zip(sites, new, strict=True):
        what = f"activation({site.channels}) for {site}"
        if not isinstance(module, nn.Module):
            raise SiteError(f"{what} must be an nn.Module, not {module!r}")
        if isinstance(module, torch.jit.ScriptModule):
            raise SiteError(f"{what} is a ScriptModule, which cannot be watched")
        check_values(module)
    if len({id(module) for module in new}) < len(new):
        raise SiteError("activation must return a new module at each call; several sites got the same one")
    return new


def _matched(sites: list[Site], activations: Mapping[str, nn.Module]) -> list[nn.Module]:
    """A copy of the activation that fits each site by channels; among several, the one with its label."""
    channels = {label: getattr(module, "in_channels", None) for label, module in activations.items()}
    new, problems = [], []
    for site in sites:
        own = [label for label in (site.label, site.name) if channels.get(label, 0) in (None, site.channels)]
        fits = own[:1] or [label for label, count in channels.items() if count == site.channels]
        named = " and ".join(map(str, fits)) + " fit" if fits else "none fits"
        if len(fits) == 1:
            new.append(copy.deepcopy(activations[fits[0]]))
        else:
            problems.append(f"{site} has {site.channels} channels: {named}")
    if problems:
        has = ", ".join(f"{label} with {n or 'no in_channels'}" for label, n in channels.items())
        advice = f"The set has {has}. Name other sites, or give no set: then each gets a fresh `Sparta`."
        raise SiteError("\n".join(["the activations do not fit the sites:", *problems, advice]))
    return new
