"""What the new activations are made by: a class, a function, a module, a set of them, or its name."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sparta_act.activations import Sparta
from sparta_act.errors import SiteError

Make = Callable[[int], nn.Module]
Activation = Callable[..., nn.Module] | nn.Module | Mapping[str, nn.Module] | str
POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
COUNTS = ("channel", "feature", "plane", "num_parameters", "width")  # in names of optional counts


def maker_of(activation: Activation) -> Make | Mapping[str, nn.Module]:
    """A function from channel count to module, or a mapping from labels to modules. Raises `SiteError`."""
    if isinstance(activation, str):
        return Sparta.from_pretrained(activation)
    if isinstance(activation, Mapping):
        wrong = [f"{k!r} ({type(m).__name__})" for k, m in activation.items() if not isinstance(m, nn.Module)]
        if wrong or not activation:
            raise SiteError(
                'a mapping must give each label a module, e.g. {"G4.B2": Sparta(64)}; '
                + (f"no module: {', '.join(wrong)}" if wrong else "this one is empty")
            )
        return activation
    if isinstance(activation, nn.Module):
        if any(True for _ in (*activation.parameters(), *activation.buffers())):
            raise SiteError(
                f"activation is one {type(activation).__name__} with parameters or buffers, for all sites; "
                "give a function that makes one for each, such as lambda channels: Sparta(channels, hidden=8)"
            )
        return lambda channels: copy.deepcopy(activation)
    if not callable(activation):
        raise SiteError(
            "activation must be a class such as nn.SiLU, a function from channel count to module such as "
            "lambda channels: Sparta(channels, hidden=8), a module without parameters, a mapping from labels "
            f'to modules, or the name of a set such as "cifar10-resnet18", not {activation!r}'
        )
    make: Callable[..., nn.Module] = activation
    return make if _takes_channels(make) else lambda channels: make()


def _takes_channels(make: Callable[..., Any]) -> bool:
    """Whether it is called with the channel count, as `Sparta` and `nn.PReLU`, or without, as `nn.SiLU`."""
    made = make
    while isinstance(made, functools.partial):
        made = made.func
    if isinstance(made, type) and made.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return False
    try:
        parameters = [*inspect.signature(make).parameters.values()]
    except (TypeError, ValueError):  # no signature is known
        return True
    positional = [p for p in parameters if p.kind in POSITIONAL]
    if any(p.default is p.empty for p in positional) or not isinstance(made, type):
        return bool(positional) or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if positional:
        return any(word in positional[0].name.lower() for word in COUNTS)
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)
