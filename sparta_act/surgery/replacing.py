"""Replaces ReLU calls of a network by another activation, and puts them back."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import nn

from sparta_act.activations import PLACE, Sparta
from sparta_act.errors import SiteError
from sparta_act.surgery.everywhere import every_site
from sparta_act.surgery.finding import find_sites, size_before
from sparta_act.surgery.grammar import Sites, listed, select
from sparta_act.surgery.kinds import parse_kinds
from sparta_act.surgery.making import Activation, maker_of
from sparta_act.surgery.network import SWAPPED, like_swapped, replaced
from sparta_act.surgery.placing import build, check_values, classes_for, put
from sparta_act.surgery.recording import inner
from sparta_act.surgery.rewriting import MARK, keys_of, original_class
from sparta_act.surgery.sandbox import (
    ONE_AT_A_TIME,
    Example,
    all_or_nothing,
    as_before,
    check_example,
    uncollected,
)
from sparta_act.surgery.sites import SiteList, shown, size_of
from sparta_act.surgery.snapshot import of_structure
from sparta_act.surgery.verifying import compare, verify

CLOSED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "ScriptModule")


P = ParamSpec("P")


def _saying_so(edit: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """A `SiteError` means that the model is as it was, and says so."""

    @functools.wraps(edit)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        try:
            return edit(*args, **kwargs)
        except SiteError as error:
            text = str(error)
            error.args = (
                f"{text}\nNothing was changed." if "\n" in text else f"{text}. Nothing was changed.",
            )
            raise

    return wrapper


def relu_sites(model: nn.Module, *, kinds: str = "relu", example: Example | None = None) -> SiteList:
    """List the ReLU calls of `model` that `replace_relus` can replace; the model is left as it was.

    Blocks come first and have a label such as "G4.B2"; all other sites go by their dotted name. The column
    `parameters` has what a `Sparta` there adds. What is replaced already is listed with what is there now.
    `kinds`: which activations count, "relu6" or several with commas, "relu, hardswish".
    `example` is an input of the network, a tensor, a tuple of arguments or a mapping of named ones; by
    default small noise is tried. Raises `SiteError` for what cannot be run or operated on.

    >>> relu_sites(torchvision.models.resnet18())  # doctest: +ELLIPSIS
    site   name      channels  calls  parameters  edit
    G1.B1  layer1.0  64        1      +14,473     rewrite
    ...
           relu      64        1      +14,473     swap
    17 calls of ReLU on feature maps ("all")
    """
    _check(model, example)
    with ONE_AT_A_TIME, uncollected():
        return shown(find_sites(inner(model), example, parse_kinds(kinds)).sites)


@_saying_so
def replace_relus(
    model: nn.Module,
    sites: Sites,
    activation: Activation = Sparta,
    *,
    kinds: str = "relu",
    example: Example | None = None,
) -> nn.Module:
    """Replace the ReLU calls at `sites`, in place and all or nothing; return the same model.

    `sites`: the last ReLU of blocks by group and block, "G4.B2", "G*.B-1", "G{1,2}.B*"; dotted names with
    shell wildcards, "features.*"; "all", every call on a feature map, inside blocks too; several with commas
    or in a list, also of sites from `relu_sites`, which lists what there is.
    `activation`: a class or function from channel count to module; a class that takes no channel count, such
    as `nn.SiLU`; a module without parameters; a mapping from labels to modules with `in_channels`, such as a
    `SpartaSet`, or the name of a set: copies go where the channels fit, and labels break ties.
    `kinds`: which activations are replaced, "relu6" or several with commas, "relu, hardswish".
    `example`: an input of the network, a tensor, a tuple of arguments or a mapping of named ones; by default
    small noise is tried.

    Raises `SiteError` when anything does not fit; the model is then as it was. Warns when the network has
    more than twice the parameters that it had before any replacement.

    >>> net = replace_relus(torchvision.models.resnet18(), "G*.B-1")
    >>> net = replace_relus(torchvision.models.resnet18(), "all", nn.SiLU)
    """
    _check(model, example)
    asked, make = listed(sites), maker_of(activation)
    network, wanted = inner(model), parse_kinds(kinds)
    with uncollected(), all_or_nothing(lambda: as_before(network)) as undo:
        found = find_sites(network, example, wanted, undo)
        chosen = select(found.sites, asked, wanted, lambda: every_site(found.network, found.sites))
        new, classes = build(chosen, make), classes_for(chosen)
        for module, cls in classes.items():
            object.__setattr__(module, "__class__", cls)  # past its own __setattr__
        for site, module in zip(chosen, new, strict=True):
            put(site.cut, module)
        edited = as_before(network)
        in_place = verify(network, chosen, new, found.example, edited)
        compare(network, chosen, new, found.example, edited, found.network.passes[:2], in_place)
        _warn_of_size(network, new)
        _forget_compiled()
        return model


@_saying_so
def restore_relus(model: nn.Module) -> nn.Module:
    """Put back, in place, every ReLU that `replace_relus` has replaced in `model`; return the same model.

    Raises `SiteError` when there is none.
    """
    _check(model)
    _check_nothing_forgotten(model)
    modules = [m for m in model.modules() if vars(m).get(SWAPPED) or hasattr(type(m), MARK)]
    if not modules:
        raise SiteError("no ReLU of this model has been replaced, so none can be restored")
    new = replaced(model).values()
    with all_or_nothing(lambda: [step for m in (*modules, *new) for step in of_structure(m)]):
        _check_nothing_moved(modules)
        for module in modules:
            _put_back(module)
        for module in new:
            vars(module).pop(PLACE, None)  # it may be put elsewhere
        _forget_compiled()
        return model


def _put_back(module: nn.Module) -> None:
    """Undo what was done to this module."""
    for key, (relu, new, dtype) in vars(module).pop(SWAPPED, {}).items():
        if (like := like_swapped(module, new)) is not None:  # where the network has been moved since
            relu.to(like.device, like.dtype if like.dtype != dtype else None)
        module._modules[key] = relu
        relu.train(module.training)
    if keys := keys_of(module):
        object.__setattr__(module, "__class__", original_class(module))
        for key in keys:
            module._modules.pop(key, None)


def _warn_of_size(network: nn.Module, new: list[nn.Module]) -> None:
    """Warn where the new activations make most of a network."""
    before, now = size_before(network, replaced(network)), size_of(network)
    if 0 < 2 * before < now:
        way_out = "lambda channels: Sparta(channels, hidden=8), or fewer sites, cost less"
        added = {type(m).__name__ for m in new}
        warnings.warn(
            f"with {', '.join(sorted(added))} at {len(new)} sites the network has {now:,} parameters, "
            f"{now / before:.1f} times the {before:,} that it had"
            + (f"; {way_out}" if "Sparta" in added else ""),
            stacklevel=4,
        )


def _check(model: nn.Module, example: Example | None = None) -> None:
    """Refuse what cannot be operated on, or run."""
    if not isinstance(model, nn.Module):
        raise SiteError(f"the model must be an nn.Module, not a {type(model).__name__}")
    first = dict[type[nn.Module], str]()  # the name of the first module of each class
    for name, module in model.named_modules():
        first.setdefault(type(module), name)
    for cls, name in first.items():
        if closed := [c.__name__ for c in cls.__mro__ if c.__name__ in CLOSED]:
            raise SiteError(
                f"{name or 'the model'} is a {closed[0]}: replace the ReLUs first, then make the optimizer, "
                "then script, compile or wrap the model"
            )
    check_values(model)
    if example is not None:
        check_example(example)


def _check_nothing_moved(modules: list[nn.Module]) -> None:
    """Refuse to restore where somebody has changed classes or children since the replacement."""
    hidden = {type(m).__name__ for m in modules if MARK not in vars(type(m)) and hasattr(type(m), MARK)}
    if hidden:
        raise SiteError(
            f"cannot restore the ReLUs: {', '.join(sorted(hidden))} got another class since they were "
            "replaced, as torch.nn.utils.parametrize gives; undo that first"
        )
    for module in modules:
        for key, (_, new, _) in vars(module).get(SWAPPED, {}).items():
            if module._modules.get(key) is not new:
                raise SiteError(
                    f"cannot restore the ReLUs: the activation that was put at {key!r} of a "
                    f"{type(module).__name__} is gone; undo what inserted, removed or set modules there"
                )


def _check_nothing_forgotten(model: nn.Module) -> None:
    """Refuse to restore a copy that has lost what was there before: torch.fx copies children alone."""
    known = {id(new) for new in replaced(model).values()}
    for name, module in model.named_modules():
        if any(c.__name__ == "GraphModule" for c in type(module).__mro__):
            lost = [
                k
                for k, m in module._modules.items()
                if m is not None and PLACE in vars(m) and id(m) not in known
            ]
            if lost:
                raise SiteError(
                    f"cannot restore the ReLUs: {name or 'the model'} is a copy of a torch.fx.GraphModule, "
                    f"which has lost what was at {', '.join(lost)}; restore before you copy"
                )


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # torch 2.4 would run its old code: it does not see a new class
        torch.compiler.reset()
