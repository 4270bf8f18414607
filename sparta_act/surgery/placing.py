"""Builds the new activations, and puts them at their sites."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from sparta_act.errors import SiteError
from sparta_act.surgery.finding import SWAPPED
from sparta_act.surgery.rewriting import digest_of, rewritten
from sparta_act.surgery.sites import Cut, Site

Activation = Callable[[int], nn.Module] | Mapping[str, nn.Module]


def check_activation(activation: object) -> None:
    """Refuse what cannot make new modules. Raises `SiteError`."""
    if isinstance(activation, Mapping):
        wrong = [f"{k!r} ({type(m).__name__})" for k, m in activation.items() if not isinstance(m, nn.Module)]
        if wrong or not activation:
            raise SiteError(
                'a mapping must give each label a module, e.g. {"G4.B2": Sparta(64)}; '
                + (f"no module: {', '.join(wrong)}" if wrong else "this one is empty")
            )
        return
    if isinstance(activation, nn.Module) or not callable(activation):
        raise SiteError(
            "activation must be a function from channel count to module, such as lambda channels: nn.GELU(), "
            "or a mapping from labels to modules, such as Sparta.from_pretrained(...) returns; "
            f"not {activation!r}"
        )
    if getattr(activation, "__module__", "") == "torch.nn.modules.activation" and activation is not nn.PReLU:
        name = getattr(activation, "__name__", "")
        raise SiteError(
            f"activation is called with the channel count, which is no argument of nn.{name}; write "
            f"lambda channels: nn.{name}()"
        )


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


def build(sites: list[Site], activation: Activation) -> list[nn.Module]:
    """A module for each site, with the device and dtype of its input, and the mode of the block around it."""
    new = _matched(sites, activation) if isinstance(activation, Mapping) else _called(sites, activation)
    for site, module in zip(sites, new, strict=True):
        like = site.cut.like
        module.to(like.device, like.dtype if like.dtype.is_floating_point else None)
        module.train(site.cut.within.training)
    return new


def subclass_for(site: Site) -> type[nn.Module] | None:
    """The rewritten class that the site needs; None for a swap. Raises `SiteError`."""
    cut = site.cut
    cls = type(cut.target)
    if cut.spans and is_parametrized(cut.target):
        raise SiteError(
            f"{site} ({site.name}) is parametrized, which changes its class as this would; "
            "replace the ReLUs first"
        )
    return rewritten(cls, digest_of(cls), cut.spans) if cut.spans else None


def put(cut: Cut, module: nn.Module, cls: type[nn.Module] | None) -> None:
    """Change the network: `module` becomes a child of the target, which gets the class `cls`, if any."""
    if cls:
        cut.target.__class__ = cls
    else:
        swapped = vars(cut.target).setdefault(SWAPPED, {})
        swapped[cut.key] = cut.target._modules[cut.key], module
    cut.target._modules[cut.key] = module


def _called(sites: list[Site], activation: Callable[[int], nn.Module]) -> list[nn.Module]:
    try:
        new = [activation(site.channels) for site in sites]
    except TypeError as error:
        raise SiteError(
            f"activation is called with the channel count, which failed: {error}. For a module that takes "
            "none, write a function: lambda channels: SwishReLU()"
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
        fits = [label for label, count in channels.items() if count == site.channels]
        fits = [label for label in fits if label == site.label] or fits
        if len(fits) == 1:
            new.append(copy.deepcopy(activations[fits[0]]))
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
