"""Checks 9 to 12 of an audit: is there a gradient, is it right, and does a gate hide it?"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from examples.paper.audit import attacks as a
from examples.paper.audit.store import Store
from examples.paper.audit.tolerances import (
    ADDS,
    ASTRAY,
    HARD,
    JUMP,
    JUMPS,
    ONLY,
    RATIO,
    SATURATED,
    WRONG,
)
from examples.paper.audit.verdicts import (
    FAIL,
    NO_GATE,
    SUSPECT,
    UNKNOWN,
    Check,
    at_most,
    beats,
    check,
    mean,
    share,
    worst,
)


def gradient(store: Store) -> Check:
    """9: AutoAttack does not warn, there is a gradient, and answers do not change."""
    images, zero = len(store.wrong[a.CLEAN]), store.numbers["zero gradients"]
    evidence = store.numbers["evidence"]
    warnings, without = _warnings(store.numbers["AutoAttack"]["warnings"])
    without = max(without, zero["without"])
    counts = {
        f"no gradient at {without} of {zero['images']} correct images": without,
        f"a fresh copy answers differently at {evidence['changed']}": evidence["changed"],
    }
    none, unsteady = (at_most(share(torch.arange(images) < k), ONLY) for k in counts.values())
    reasons = {
        "AutoAttack warns (random answers, probabilities instead of logits, gradients inside?)": warnings,
        "there is no gradient to follow": none in (FAIL, SUSPECT),
        "the network changes its answers": unsteady in (FAIL, SUSPECT),
        "an image lies beyond eps": not evidence["within eps"],
    }
    certain = bool(warnings) or not evidence["within eps"]
    return check(
        9,
        "AutoAttack does not warn, there is a gradient",
        "; ".join([", ".join(warnings) or "no warning", *counts]),
        worst([none, unsteady, *([FAIL] if certain else [])]),
        passed="deterministic, with gradients and logits",
        failed=", ".join(reason for reason, holds in reasons.items() if holds),
        unknown="too few images to exclude a few without a gradient or with a changed answer",
    )


def _warnings(texts: Sequence[str]) -> tuple[list[str], int]:
    """AutoAttack's warnings in short, and of how many images it says that their gradient is zero."""
    zero = [re.match(r"there are (\d+) points with zero gradient", text) for text in texts]
    others = [
        text.split("!")[0].split(",")[0] for text, is_zero in zip(texts, zero, strict=True) if not is_zero
    ]
    return others, max((int(found[1]) for found in zero if found), default=0)


def adaptive(store: Store) -> Check:
    """10: gradients around gates, through a surrogate, of noisy copies or in float64 are no better."""
    through = sorted(n for n in store.wrong if n.startswith(a.THROUGH))
    names = [n for n in (*a.ADAPTIVE, *a.AROUND, *through, a.NOISY, a.FLOAT64) if n in store.wrong]
    found = {n.removeprefix("PGD, "): beats(store.wrong[n], store.wrong[a.PLAIN]) for n in names}
    verdicts = {n: at_most(d, ADDS) for n, d in found.items()}
    certain = [n for n in found if verdicts[n] == FAIL]
    best = max(certain or found, key=lambda n: found[n].value, default="")
    figures = [f"{n} {d}" for n, d in found.items()]
    if a.FLOAT64 not in names:
        figures, verdicts["float64"] = [*figures, f"float64 {store.numbers[a.FLOAT64]}"], UNKNOWN
    return check(
        10,
        "adaptive attacks add nothing",
        "; ".join(figures),
        worst(verdicts.values()),
        passed="no other gradient is better",
        failed=f"the gradient of {best} is better: the real one is masked",
        unknown="too few images to exclude a better gradient",
    )


def gate(store: Store) -> Check:
    """11: gates are soft: SPARTA's pass the gradient on, and other sigmoid-like calls are not saturated."""
    name, verdicts, figures = "gates are soft", dict[str, str](), []
    for site, clean in store.numbers["gate"].items():
        hard = [_hard(g) for g in (clean, store.numbers["gate, attacked"][site])]
        verdicts[site] = worst(at_most(share(h), HARD) for h in hard)
        closed, opened, ratio = (mean(clean[k]).value for k in ("closed", "open", "ratio"))
        figures.append(
            f"{site} {closed:.1%} < 0.01, {opened:.1%} > 0.99, gradient {ratio:.2f}, hard at "
            f"{int(hard[0].sum())} clean and {int(hard[1].sum())} attacked of {len(hard[0])} images"
        )
    for site, near in store.numbers["sigmoids"].items():
        saturated = torch.tensor(near) > SATURATED
        verdict = at_most(share(saturated), HARD)
        verdicts[site] = SUSPECT if verdict == FAIL else verdict  # it may scale or normalize, not gate
        count = f"saturated at {int(saturated.sum())} of {len(near)} images"
        figures.append(f"{site} {mean(near).value:.1%} near its ends, {count}")
    if not verdicts:
        nothing = "no SPARTA, sigmoid, hardsigmoid or tanh found"
        return Check(11, name, nothing, NO_GATE, "a gate of other operations is not seen here")
    sites = ", ".join(site for site in verdicts if verdicts[site] in (FAIL, SUSPECT))
    return check(
        11,
        name,
        "; ".join(figures),
        worst(verdicts.values()),
        passed="no site is a hard mask",
        failed=f"hard mask at {sites}: the gate has no gradient there",
        unknown="it may be meant so: look whether check 10 finds a better gradient"
        if SUSPECT in verdicts.values()
        else "too few images, or a few with a hard mask",
    )


def ways(store: Store) -> Check:
    """12: the gradient is the derivative, and adds up to what the network does along a way."""
    point = store.numbers["derivative"]
    random, attack = (torch.tensor(store.numbers[n]) for n in ("along random ways", "along the attack"))
    astray, jumps = ~(random <= ASTRAY), ~(attack <= JUMP)  # a NaN is wrong
    found = {"astray": at_most(share(astray), 0.5), "jumps": at_most(share(jumps), JUMPS)}
    figures = [
        f"along random ways of length eps the rise is missed by {_median(random)} (median), along the attack "
        f"at {int(jumps.sum())} of {len(jumps)} images by more than half"
    ]
    if isinstance(point, list):
        wrong = ~(torch.tensor(point) <= WRONG)
        both = wrong.clone()
        both[store.wrong[a.CLEAN]] = False
        both[~store.wrong[a.CLEAN]] &= jumps
        found["wrong"] = at_most(share(both), ONLY)
        figures.append(
            f"wrong at a point at {int(wrong.sum())}, and along the attack too at {int(both.sum())}"
        )
    else:
        figures.append(f"at a point {point}")
    reasons = {
        "astray": "autograd's gradient is not the derivative",
        "wrong": "autograd's gradient is not the derivative",
        "jumps": "the network jumps where attacks go: its gradient does not see them",
    }
    failed = dict.fromkeys(reasons[n] for n, verdict in found.items() if verdict in (FAIL, SUSPECT))
    stairs = isinstance(point, list) and at_most(share(wrong), ONLY) == FAIL
    return check(
        12,
        "the gradient is the derivative",
        "; ".join(figures),
        worst(found.values()),
        passed="stairs at a point, but right over the length of an attack"
        if stairs
        else "at a point and along ways",
        failed=", ".join(failed),
        unknown="too few images that were right to exclude jumps",
    )


def _median(errors: Tensor) -> str:
    return f"{errors.nan_to_num(1.0).median().item():.0%}" if len(errors) else "nothing"


def _hard(g: Mapping[str, Sequence[float]]) -> Tensor:
    """Images at which a site is a hard mask, (N,) of bool."""
    closed, opened, ratio = (torch.tensor(g[k]) for k in ("closed", "open", "ratio"))
    return (closed + opened > SATURATED) | ~(ratio >= RATIO)
