"""The activations that can be replaced, by their names in torch."""

import functools

from torch import nn

from sparta_act.errors import SiteError

_RECTIFIERS = ("relu", "relu6", "leaky_relu", "prelu", "hardtanh", "elu", "celu", "selu", "softplus")
KINDS = (*_RECTIFIERS, "gelu", "silu", "mish", "hardswish")
OTHERS = ("glu", "hardsigmoid", "rrelu", "sigmoid", "softshrink", "softsign", "tanh")  # never replaced
SPELLED = {name.replace("_", ""): name for name in (*KINDS, *OTHERS)}


@functools.lru_cache(maxsize=1024)
def spelled(name: str) -> str | None:
    """The activation that a function or class of torch is: "leaky_relu" for LeakyReLU and leaky_relu_."""
    return SPELLED.get(name.lower().replace("_", ""))


def kind_of(module: nn.Module) -> str | None:
    """The activation that a module of torch.nn, or of a class derived from one, is."""
    return next(filter(None, (spelled(c.__name__) for c in type(module).__mro__)), None)


def parse_kinds(asked: str) -> frozenset[str]:
    """The activations in a text such as "relu, ReLU6". Raises `SiteError`."""
    if not isinstance(asked, str):
        raise SiteError(f'kinds must be a text such as "relu" or "relu, relu6", not {asked!r}')
    words = [word.strip() for word in asked.split(",")]
    unknown = [word for word in words if spelled(word) not in KINDS]
    if unknown:
        raise SiteError(f"kinds: cannot replace {', '.join(map(repr, unknown))}, only {', '.join(KINDS)}")
    return frozenset(s for word in words if (s := spelled(word)))


def in_words(kinds: frozenset[str]) -> str:
    """The kinds, for a sentence: "ReLU or hardswish"."""
    return " or ".join("ReLU" if kind == "relu" else kind for kind in KINDS if kind in kinds)


def hint(present: set[str]) -> str:
    """Which `kinds` to ask for instead, among those present; empty if none can be replaced."""
    possible = [kind for kind in KINDS if kind in present]
    return f'; to replace that, ask for kinds="{", ".join(possible)}"' if possible else ""
