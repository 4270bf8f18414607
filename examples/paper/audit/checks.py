"""The eleven checks of an audit: from what the attacks found to pass, FAIL or not enough data.

After Athalye et al. 2018 (arXiv:1802.00420), Carlini et al. 2019 (arXiv:1902.06705) and Croce & Hein 2020
(arXiv:2003.01690), whose advice each check puts into a number. One rule decides all of them: a difference is
held against a tolerance with its 95% interval. Below it for certain: pass. Above it for certain: FAIL.
The interval on both sides of it: not enough data.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.audit import attacks as a
from examples.paper.audit.store import Store

PASS, FAIL, UNKNOWN = "pass", "FAIL", "not enough data"
NO_GATE = "no gate"  # of the check that looks at one
Z = 1.959964

# Points by which one attack may beat another without a word. What sets them is a ReLU network without a gate,
# adversarially trained, whose figures stand in docs/audit.md: it must pass
ADDS = 0.02  # twice the steps, or a gradient that goes around the gate
CHOICE = 0.03  # ten restarts, or another size of step
LOSS = 0.05  # another loss, AutoAttack, all together: some points stronger on any network
ONLY = 0.01  # of all images, broken by gradient-free attacks alone, or right at the largest eps
RISE = 0.10  # of the loss' rise in the first half of the steps, in the second
SATURATED = 0.50  # of a site's gate at one image: more is a hard mask
RATIO = 0.10  # of ReLU's gradient norm at one image: less is
HARD = 0.05  # of the images may have a hard mask at a site
WRONG = 0.05  # of the derivative along a direction, in the gradient of one image


class Check(NamedTuple):
    """One row of the audit."""

    number: int
    name: str
    figure: str
    verdict: str
    meaning: str


class Difference(NamedTuple):
    """A number and the half width of its 95% interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} ± {100 * self.half:.1f}"

    def below(self, most: float) -> str:
        """The verdict on a number that must not exceed `most`."""
        if self.value - self.half > most:
            return FAIL
        return PASS if self.value + self.half <= most else UNKNOWN

    def negative(self) -> str:
        """The verdict on a number that must be below 0."""
        if self.value - self.half > 0:
            return FAIL
        return PASS if self.value + self.half < 0 else UNKNOWN


def beats(one: Tensor, other: Tensor) -> Difference:
    """Share of images that `one` breaks, minus that of `other`, both (N,) of bool, on the same images.

    With a pseudo-count in each cell, so that no disagreement among five images is not certainty.
    Source: Bonett & Price 2012, doi:10.3102/1076998611411915, adjusted Wald interval for paired proportions.
    """
    n = len(one) + 2
    more, less = (int((p & ~q).sum() + 1) / n for p, q in ((one, other), (other, one)))
    return Difference(more - less, Z * math.sqrt((more + less - (more - less) ** 2) / n))


def mean(values: Iterable[float]) -> Difference:
    """Mean of a number over images, and its interval; of fewer than 30 images an endless one."""
    t = torch.tensor(list(values), dtype=torch.float64)
    half = Z * t.std().item() / math.sqrt(len(t)) if len(t) >= 30 else math.inf
    return Difference(t.mean().item() if len(t) else 0.0, half)


def worst(verdicts: Iterable[str]) -> str:
    """FAIL if any is, else not enough data if any is; of none, not enough data."""
    found = set(verdicts)
    return FAIL if FAIL in found else UNKNOWN if UNKNOWN in found or not found else PASS


def all_checks(store: Store) -> list[Check]:
    """The rows, in the order of their numbers."""
    return [check(store) for check in CHECKS]


def iterative(store: Store) -> Check:
    """1: a single step must be weaker."""
    d = beats(store.wrong[a.FGSM], store.wrong[a.PLAIN])
    verdict = d.negative()
    return Check(
        1,
        "iterative attacks beat a single step",
        f"FGSM minus PGD {d}",
        verdict,
        {
            PASS: "following the gradient for many steps pays",
            FAIL: "steps after the first lead astray: the gradient does not point where the loss rises",
            UNKNOWN: "the two are too close to tell which is stronger",
        }[verdict],
    )


def doubling(store: Store) -> Check:
    """2: twice the steps add nothing, the loss has stopped rising."""
    d = beats(store.wrong[a.LONG], store.wrong[a.PLAIN])
    curve = store.numbers["loss curve"]
    rise, late = mean(curve["rise"]), mean(curve["late"])
    figure = f"{d} by twice the steps; the loss rises by {rise.value:.2f}, then by {late.value:+.3f}"
    risen = PASS if rise.value - rise.half > 0 else FAIL if rise.value + rise.half <= 1e-3 else UNKNOWN
    flat = Difference(late.value - RISE * rise.value, late.half).below(0)
    verdict = worst([d.below(ADDS), risen, flat])
    meaning = {
        PASS: "the attack has converged",
        FAIL: "PGD cannot raise the loss"
        if risen == FAIL
        else "the attack has not converged: its figure is too good",
        UNKNOWN: "too few images to say whether it has converged",
    }[verdict]
    return Check(2, "twice the steps add nothing", figure, verdict, meaning)


def choices(store: Store) -> Check:
    """3: neither restarts nor another size of step add much."""
    restarts = beats(store.wrong[a.RESTARTS], store.wrong[a.PLAIN])
    sizes = {name: beats(store.wrong[name], store.wrong[a.PLAIN]) for name in a.STEP_SIZES}
    best = max(sizes, key=lambda name: sizes[name].value)
    verdict = worst(d.below(CHOICE) for d in (restarts, *sizes.values()))
    return Check(
        3,
        "restarts and step sizes add little",
        f"restarts {restarts}; {best.removeprefix('PGD, ')} {sizes[best]}",
        verdict,
        {
            PASS: "the figure does not hang on how PGD was set up",
            FAIL: "another set-up of PGD is much stronger: the loss is rugged, or its gradient random",
            UNKNOWN: "too few images to exclude a better set-up",
        }[verdict],
    )


def sweep(store: Store) -> Check:
    """4: the larger eps, the more errors, up to all of them."""
    names = [a.CLEAN, "PGD at eps/4", "PGD at eps/2", a.PLAIN, "PGD at 2 eps", "PGD at 4 eps", a.AT_LARGEST]
    wrong = [store.wrong[n] for n in names if n in store.wrong]
    rising = [beats(few, many).below(ONLY) for few, many in itertools.pairwise(wrong)]
    left = beats(torch.ones_like(wrong[-1]), wrong[-1])
    verdict = worst([*rising, left.below(ONLY)])
    falling = FAIL in rising
    errors = " ".join(f"{100 * w.float().mean():.0f}" for w in wrong)
    return Check(
        4,
        "error rises with eps, to 100%",
        f"{errors}; right at 128/255: {int((~wrong[-1]).sum())} of {len(wrong[-1])}",
        verdict,
        {
            PASS: "with room enough the attack breaks everything",
            FAIL: "a larger eps breaks fewer images: the attack loses its way"
            if falling
            else "the attack fails where no network can be right: it is the attack that is weak",
            UNKNOWN: "too few images to exclude a handful that never fall",
        }[verdict],
    )


def gradient_free(store: Store) -> Check:
    """5: who sees no gradient of this network finds nothing that the gradient does not show."""
    known = a.white_box(store)
    blind = {
        n: beats(known | w, known) for n, w in store.wrong.items() if n.startswith((a.TRANSFER, a.NOISE))
    }
    blind[a.SQUARE] = beats(known | store.wrong[a.SQUARE], known)
    verdicts = [d.below(ONLY) for d in blind.values()]
    square, hard = store.numbers[a.SQUARE], store.numbers[a.HARD_LABEL]
    if hard["broken"]:  # a spot check: what it says of its few images holds for all that stand
        given = torch.arange(hard["standing"]) < hard["broken"]
        share = (~known).float().mean().item()
        d = beats(given, torch.zeros_like(given))
        verdicts.append(FAIL if Difference(share * d.value, share * d.half).below(ONLY) == FAIL else UNKNOWN)
    weak = [a.SQUARE] if square["standing"] and 4 * square["control broken"] < square["control"] else []
    weak += [a.HARD_LABEL] if hard["standing"] and hard["control"] and not hard["control broken"] else []
    verdict = worst([*verdicts, *(UNKNOWN for _ in weak)])
    others = max((n for n in blind if n != a.SQUARE), key=lambda n: blind[n].value)
    told = [
        f"{name} {n['broken']} of {n['standing']}, of fallen {n['control broken']} of {n['control']}"
        for name, n in ((a.SQUARE, square), (a.HARD_LABEL, hard))
    ]
    return Check(
        5,
        "attacks without its gradient add nothing",
        f"Square {blind[a.SQUARE]}; {others} {blind[others]}; " + "; ".join(told),
        verdict,
        {
            PASS: "what stands does not hide behind a broken gradient",
            FAIL: "images fall without the gradient that stand against it: the gradient is masked",
            UNKNOWN: f"{' and '.join(weak)} broke hardly what white-box attacks broke: too weak to tell"
            if weak
            else "too few images, or a few that only they broke",
        }[verdict],
    )


def transfer(store: Store) -> Check:
    """6: images made for another network are weaker."""
    found = {n: beats(w, store.wrong[a.PLAIN]) for n, w in store.wrong.items() if n.startswith(a.TRANSFER)}
    verdict = worst(d.negative() for d in found.values())
    figure = "; ".join(f"{n.removeprefix(a.TRANSFER)} {d}" for n, d in found.items()) or "no surrogate given"
    return Check(
        6,
        "transferred images are weaker",
        figure,
        verdict,
        {
            PASS: "the network's own gradients beat those of another",
            FAIL: "another network's gradients are the better ones: this network's are masked",
            UNKNOWN: "transfer and white-box are too close to tell"
            if found
            else "name networks to attack from with --surrogate",
        }[verdict],
    )


def random_noise(store: Store) -> Check:
    """7: blind draws are weaker."""
    d = beats(store.wrong[a.NOISE], store.wrong[a.PLAIN])
    verdict = d.negative()
    return Check(
        7,
        "random noise is weaker",
        f"noise minus PGD {d}",
        verdict,
        {
            PASS: "the gradient is worth more than luck",
            FAIL: "luck beats the gradient",
            UNKNOWN: "PGD is hardly better than luck, or there are too few images",
        }[verdict],
    )


def agreement(store: Store) -> Check:
    """8: the losses agree, and AutoAttack, and all together."""
    attacks = {n: store.wrong[n] for n in (*a.LOSSES, *a.TARGETED, a.AUTOATTACK)}
    attacks["all attacks together"] = store.broken()
    found = {n.removeprefix("PGD, "): beats(w, store.wrong[a.PLAIN]) for n, w in attacks.items()}
    verdicts = {n: Difference(abs(d.value), d.half).below(LOSS) for n, d in found.items()}
    verdict = worst(verdicts.values())
    far = max((n for n in found if verdicts[n] == verdict), key=lambda n: abs(found[n].value))
    return Check(
        8,
        "losses agree",
        "; ".join(f"{n} {d}" for n, d in found.items()),
        verdict,
        {
            PASS: "the figure does not hang on the loss",
            FAIL: f"{far} and plain cross-entropy differ: one of the two is blind",
            UNKNOWN: "too few images to say that they agree",
        }[verdict],
    )


def flags(store: Store) -> Check:
    """9: AutoAttack's own warnings; the gradient is the derivative; answers stay what they were."""
    images, n = len(store.wrong[a.CLEAN]), store.numbers["zero gradients"]
    warnings, without = [], n["without"]
    for warning in store.numbers["AutoAttack"]["warnings"]:
        if zero := re.match(r"there are (\d+) points with zero gradient", warning):
            without = max(without, int(zero[1]))
        else:
            warnings.append(warning.split("!")[0].split(",")[0])
    derivative, evidence = store.numbers["derivative"], store.numbers["evidence"]
    possible = isinstance(derivative, list)
    wrong = sum(not e <= WRONG for e in derivative) if possible else 0  # a NaN is wrong
    counts = {
        f"no gradient at {without} of {n['images']} right images": without,
        f"not the derivative at {wrong}" if possible else f"derivative {derivative}": wrong,
        f"another answer when a fresh copy is asked at {evidence['changed']}": evidence["changed"],
    }
    verdicts = [
        beats(torch.arange(images) < k, torch.zeros(images, dtype=torch.bool)).below(ONLY)
        for k in counts.values()
    ]
    verdicts += [FAIL] if warnings or not evidence["within eps"] else []
    verdict = worst([*verdicts, *([] if possible else [UNKNOWN])])
    reasons = [
        "the usual attacks mean little (random answers, probabilities for logits, gradients inside?)"
        if warnings
        else "",
        "there is no gradient to follow" if verdicts[0] == FAIL else "",
        "autograd's gradient is not the network's" if verdicts[1] == FAIL else "",
        "the network does not stand by its answers" if verdicts[2] == FAIL else "",
        "" if evidence["within eps"] else "an image lies beyond eps",
    ]
    return Check(
        9,
        "AutoAttack's flags are silent, the gradient is true",
        "; ".join([", ".join(warnings) or "silent", *counts]),
        verdict,
        {
            PASS: "deterministic, differentiable, logits",
            FAIL: ", ".join(filter(None, reasons)),
            UNKNOWN: "too few images to exclude a few without a true gradient or a steady answer",
        }[verdict],
    )


def adaptive(store: Store) -> Check:
    """10: gradients that go around the gate are no better."""
    names = [n for n in (*a.ADAPTIVE, a.FLOAT64) if n in store.wrong]
    found = {n: beats(store.wrong[n], store.wrong[a.PLAIN]) for n in names}
    verdicts = [d.below(ADDS) for d in found.values()]
    certain = [n for n, verdict in zip(names, verdicts, strict=True) if verdict == FAIL]
    best = max(certain or names, key=lambda n: found[n].value, default="")
    gated = any(n in store.wrong for n in a.ADAPTIVE)
    figure = [f"{n.removeprefix('PGD, ')} {d}" for n, d in found.items()]
    if a.FLOAT64 not in found:
        figure, verdicts = [*figure, f"float64 {store.numbers[a.FLOAT64]}"], [*verdicts, UNKNOWN]
    verdict = worst(verdicts)
    return Check(
        10,
        "adaptive attacks on the gate add nothing" if gated else "float64 adds nothing (no SPARTA found)",
        "; ".join(figure),
        verdict,
        {
            PASS: "the gate hides no gradient" if gated else "float32 hides no gradient",
            FAIL: f"{best.removeprefix('PGD, ')} is the better gradient: the real one is masked",
            UNKNOWN: "too few images to exclude it" if found else "float64 could not be tried",
        }[verdict],
    )


def gate_statistics(store: Store) -> Check:
    """11: the gate is soft and lets the gradient through, on clean images and on attacked ones."""
    name, verdicts, told = "the gate is soft", dict[str, str](), []
    for site, clean in store.numbers["gate"].items():
        attacked = store.numbers["gate, attacked"][site]
        hard = [_hard(g) for g in (clean, attacked)]
        verdicts[site] = worst(beats(h, torch.zeros_like(h)).below(HARD) for h in hard)
        closed, opened, ratio = (mean(clean[k]).value for k in ("closed", "open", "ratio"))
        told.append(
            f"{site} {closed:.1%} < 0.01, {opened:.1%} > 0.99, gradient {ratio:.2f}, hard at "
            f"{int(hard[0].sum())} and attacked at {int(hard[1].sum())} of {len(hard[0])} images"
        )
    if not verdicts:
        return Check(11, name, "no SPARTA found", NO_GATE, "nothing to look at")
    verdict = worst(verdicts.values())
    sites = ", ".join(site for site in verdicts if verdicts[site] == FAIL)
    return Check(
        11,
        name,
        "; ".join(told),
        verdict,
        {
            PASS: "no site is a hard mask, and each passes on a gradient like ReLU's",
            FAIL: f"hard mask at {sites}: there the gate has no gradient",
            UNKNOWN: "too few images, or some with a hard mask",
        }[verdict],
    )


def _hard(g: Mapping[str, Sequence[float]]) -> Tensor:
    """Images at which a site is a hard mask, (N,) of bool."""
    closed, opened, ratio = (torch.tensor(g[k]) for k in ("closed", "open", "ratio"))
    return (closed + opened > SATURATED) | ~(ratio >= RATIO)


CHECKS = (
    iterative,
    doubling,
    choices,
    sweep,
    gradient_free,
    transfer,
    random_noise,
    agreement,
    flags,
    adaptive,
    gate_statistics,
)
