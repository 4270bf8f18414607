"""Checks 9 to 11 of an audit: is the gradient right, and does SPARTA's gate hide it?"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from examples.paper.audit import attacks as a
from examples.paper.audit.store import Store
from examples.paper.audit.tolerances import ADDS, HARD, ONLY, RATIO, SATURATED, WRONG
from examples.paper.audit.verdicts import FAIL, NO_GATE, UNKNOWN, Check, beats, check, mean, share, worst


def gradient(store: Store) -> Check:
    """9: AutoAttack does not warn, autograd's gradient is the derivative, and answers do not change."""
    images, zero = len(store.wrong[a.CLEAN]), store.numbers["zero gradients"]
    derivative, evidence = store.numbers["derivative"], store.numbers["evidence"]
    warnings, without = _warnings(store.numbers["AutoAttack"]["warnings"])
    without = max(without, zero["without"])
    possible = isinstance(derivative, list)
    wrong = sum(not error <= WRONG for error in derivative) if possible else 0  # a NaN is wrong
    counts = {
        f"no gradient at {without} of {zero['images']} correct images": without,
        f"wrong gradient at {wrong}" if possible else f"derivative {derivative}": wrong,
        f"a fresh copy answers differently at {evidence['changed']}": evidence["changed"],
    }
    none, untrue, unsteady = (share(torch.arange(images) < k).at_most(ONLY) for k in counts.values())
    reasons = {
        "AutoAttack warns (random answers, probabilities instead of logits, gradients inside?)": warnings,
        "there is no gradient to follow": none == FAIL,
        "autograd's gradient is not the derivative": untrue == FAIL,
        "the network changes its answers": unsteady == FAIL,
        "an image lies beyond eps": not evidence["within eps"],
    }
    failed = [reason for reason, holds in reasons.items() if holds]
    verdicts = [none, untrue, unsteady, *([] if possible else [UNKNOWN]), *([FAIL] if failed else [])]
    return check(
        9,
        "AutoAttack does not warn, the gradient is right",
        "; ".join([", ".join(warnings) or "no warning", *counts]),
        worst(verdicts),
        passed="deterministic, differentiable, logits",
        failed=", ".join(failed),
        unknown="too few images to exclude a few with a wrong gradient or a changed answer",
    )


def _warnings(texts: Sequence[str]) -> tuple[list[str], int]:
    """AutoAttack's warnings in short, and of how many images it says that their gradient is zero."""
    zero = [re.match(r"there are (\d+) points with zero gradient", text) for text in texts]
    others = [
        text.split("!")[0].split(",")[0] for text, is_zero in zip(texts, zero, strict=True) if not is_zero
    ]
    return others, max((int(found[1]) for found in zero if found), default=0)


def adaptive(store: Store) -> Check:
    """10: gradients that go around the gate, or are formed in float64, are no better."""
    names = [n for n in (*a.ADAPTIVE, a.FLOAT64) if n in store.wrong]
    found = {n.removeprefix("PGD, "): beats(store.wrong[n], store.wrong[a.PLAIN]) for n in names}
    verdicts = {n: d.at_most(ADDS) for n, d in found.items()}
    certain = [n for n in found if verdicts[n] == FAIL]
    best = max(certain or found, key=lambda n: found[n].value, default="")
    gated = any(n in a.ADAPTIVE for n in names)
    figures = [f"{n} {d}" for n, d in found.items()]
    if a.FLOAT64 not in names:
        figures, verdicts["float64"] = [*figures, f"float64 {store.numbers[a.FLOAT64]}"], UNKNOWN
    return check(
        10,
        "adaptive attacks on the gate add nothing" if gated else "float64 adds nothing (no SPARTA found)",
        "; ".join(figures),
        worst(verdicts.values()),
        passed="the gate hides no gradient" if gated else "float32 hides no gradient",
        failed=f"the gradient of {best} is better: the real one is masked",
        unknown="too few images to exclude a better gradient" if found else "float64 could not be tried",
    )


def gate(store: Store) -> Check:
    """11: the gate is soft and passes the gradient on, on clean images and on attacked ones."""
    name, verdicts, figures = "the gate is soft", dict[str, str](), []
    for site, clean in store.numbers["gate"].items():
        hard = [_hard(g) for g in (clean, store.numbers["gate, attacked"][site])]
        verdicts[site] = worst(share(h).at_most(HARD) for h in hard)
        closed, opened, ratio = (mean(clean[k]).value for k in ("closed", "open", "ratio"))
        figures.append(
            f"{site} {closed:.1%} < 0.01, {opened:.1%} > 0.99, gradient {ratio:.2f}, hard at "
            f"{int(hard[0].sum())} clean and {int(hard[1].sum())} attacked of {len(hard[0])} images"
        )
    if not verdicts:
        return Check(11, name, "no SPARTA found", NO_GATE, "nothing to check")
    sites = ", ".join(site for site in verdicts if verdicts[site] == FAIL)
    return check(
        11,
        name,
        "; ".join(figures),
        worst(verdicts.values()),
        passed="no site is a hard mask",
        failed=f"hard mask at {sites}: the gate has no gradient there",
        unknown="too few images, or a few with a hard mask",
    )


def _hard(g: Mapping[str, Sequence[float]]) -> Tensor:
    """Images at which a site is a hard mask, (N,) of bool."""
    closed, opened, ratio = (torch.tensor(g[k]) for k in ("closed", "open", "ratio"))
    return (closed + opened > SATURATED) | ~(ratio >= RATIO)
