"""The words a user chooses by: the names of activations, and the language of sites, `G4.B2, features.*`."""

import re
from dataclasses import dataclass

from torch import nn

from sparta_act.errors import SiteError

_RECTIFIERS = ("relu", "relu6", "leaky_relu", "prelu", "hardtanh", "elu", "celu", "selu", "softplus")
KINDS = (*_RECTIFIERS, "gelu", "silu", "mish", "hardswish")
OTHERS = ("glu", "hardsigmoid", "rrelu", "sigmoid", "softshrink", "softsign", "tanh")  # never replaced
SPELLED = {name.replace("_", ""): name for name in (*KINDS, *OTHERS)}

NUMBER = r"-?\d{1,9}"
NUMBERS = rf"(\*|{NUMBER}|\{{\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\}})"
LABEL = re.compile(rf"G{NUMBERS}\.B{NUMBERS}", re.ASCII)
COMMA = re.compile(r",(?![^{}]*\})")  # not those in braces

Numbers = tuple[int, ...] | None  # None for `*`


def spelled(name: str) -> str | None:
    """The activation that a function or class of torch is: "leaky_relu" for LeakyReLU and leaky_relu_."""
    return SPELLED.get(name.lower().replace("_", ""))


def kind_of(module: nn.Module) -> str | None:
    """The activation that a module of torch.nn, or of a class derived from one, is."""
    return next(filter(None, (spelled(c.__name__) for c in type(module).__mro__)), None)


def parse_kinds(asked: str) -> frozenset[str]:
    """The activations in a text such as "relu, ReLU6". Raises `SiteError`."""
    if not isinstance(asked, str):
        raise SiteError(f'kinds must be a text such as "relu" or "relu, relu6", got {asked!r}')
    words = [word.strip() for word in asked.split(",")]
    unknown = [word for word in words if spelled(word) not in KINDS]
    if unknown:
        raise SiteError(f"kinds: cannot replace {', '.join(map(repr, unknown))}, only {', '.join(KINDS)}.")
    return frozenset(s for word in words if (s := spelled(word)))


def hint(there: set[str]) -> str:
    """What to ask for instead, among the calls that are there; empty if there is nothing."""
    possible = [kind for kind in KINDS if kind in there]
    return f'; to replace that, ask for kinds="{", ".join(possible)}"' if possible else ""


def told(kinds: frozenset[str]) -> str:
    """The kinds, for a sentence."""
    return " or ".join("ReLU" if kind == "relu" else kind for kind in KINDS if kind in kinds)


@dataclass(frozen=True)
class Label:
    """Residual blocks by group and number, such as `G{1,2}.B*`; negative numbers count from the last."""

    groups: Numbers
    blocks: Numbers

    def __str__(self) -> str:
        return f"G{_text(self.groups)}.B{_text(self.blocks)}"


@dataclass(frozen=True)
class Name:
    """A dotted name, with the shell's wildcards."""

    pattern: str

    def __str__(self) -> str:
        return self.pattern


def parse(asked: str) -> list[Label | Name]:
    """The terms of `asked`. Raises `SiteError`, which names every term that cannot be read."""
    if not isinstance(asked, str) or not asked.strip():
        raise SiteError(
            f'sites must be a text such as "G4.B2", "G*.B-1, relu" or "features.*", got {asked!r}'
        )
    terms, problems = list[Label | Name](), list[str]()
    for text in map(str.strip, COMMA.split(asked)):
        match = LABEL.fullmatch(text)
        if match:
            terms.append(Label(_numbers(match[1]), _numbers(match[2])))
        elif not text:
            problems.append("empty name: there is a comma too many")
        elif "{" in text or "}" in text:
            problems.append(f"{text}: braces are for numbers, as in G{{1,2}}.B*")
        else:
            terms.append(Name(text))
    if problems:
        raise SiteError("\n".join([f"cannot read the sites {asked!r}; nothing was changed.", *problems]))
    return terms


def _numbers(text: str) -> Numbers:
    return None if text == "*" else tuple(map(int, text.strip("{}").split(",")))


def _text(numbers: Numbers) -> str:
    if numbers is None:
        return "*"
    return str(numbers[0]) if len(numbers) == 1 else f"{{{','.join(map(str, numbers))}}}"
