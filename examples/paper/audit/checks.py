"""The twelve checks of an audit. Checks 1 to 8 compare attacks; the others are in `gradient_checks`.

Each puts a number on the advice of Athalye et al. 2018 (arXiv:1802.00420), Carlini et al. 2019
(arXiv:1902.06705) and Croce & Hein 2020 (arXiv:2003.01690). One rule decides all of them: the 95% interval
of a difference is compared with a tolerance. It is below: pass. It is above: FAIL. Else there is not enough
data, and where the difference itself is above, it is suspect.
"""

import itertools

from examples.paper.audit import attacks as a
from examples.paper.audit.gradient_checks import adaptive, gate, gradient, ways
from examples.paper.audit.store import Store
from examples.paper.audit.tolerances import ADDS, LOSS, ONLY, RISE, SETTING
from examples.paper.audit.verdicts import (
    FAIL,
    PASS,
    UNKNOWN,
    Check,
    at_most,
    beats,
    check,
    mean,
    negative,
    share,
    worst,
)


def all_checks(store: Store) -> list[Check]:
    """The rows, in the order of their numbers."""
    return [row(store) for row in CHECKS]


def single_step(store: Store) -> Check:
    """1: a single step must be weaker."""
    d = beats(store.wrong[a.FGSM], store.wrong[a.PLAIN])
    return check(
        1,
        "iterative attacks beat a single step",
        f"FGSM minus PGD {d}",
        negative(d),
        passed="more steps break more images",
        failed="a single step breaks more images: the gradient of later steps misleads",
        unknown="too close to tell which is stronger",
    )


def twice_the_steps(store: Store) -> Check:
    """2: twice the steps add nothing, and the loss has stopped rising."""
    d = beats(store.wrong[a.LONG], store.wrong[a.PLAIN])
    rise, late = (mean(store.numbers["loss curve"][half]) for half in ("rise", "late"))
    risen = PASS if rise.low > 0 else FAIL if rise.high <= 1e-3 else UNKNOWN
    flat = at_most(late, RISE * rise.value)
    return check(
        2,
        "twice the steps add nothing",
        f"{d} by twice the steps; the loss rises by {rise.value:.2f}, then by {late.value:+.3f}",
        worst([at_most(d, ADDS), risen, flat]),
        passed="the attack has converged",
        failed="PGD cannot raise the loss"
        if risen == FAIL
        else "the attack has not converged: the true error is higher",
        unknown="too few images to tell whether the attack has converged",
    )


def restarts_and_step_sizes(store: Store) -> Check:
    """3: neither restarts nor another step size add much."""
    restarts = beats(store.wrong[a.RESTARTS], store.wrong[a.PLAIN])
    sizes = {name: beats(store.wrong[name], store.wrong[a.PLAIN]) for name in a.STEP_SIZES}
    best = max(sizes, key=lambda name: sizes[name].value)
    return check(
        3,
        "restarts and step sizes add little",
        f"restarts {restarts}; {best.removeprefix('PGD, ')} {sizes[best]}",
        worst(at_most(d, SETTING) for d in (restarts, *sizes.values())),
        passed="the error does not depend on the settings of PGD",
        failed="another setting of PGD is much stronger: the loss is rugged, or its gradient random",
        unknown="too few images to exclude a stronger setting",
    )


def larger_eps(store: Store) -> Check:
    """4: the larger eps, the more errors, up to all images."""
    names = [a.CLEAN, *a.SMALLER_EPS, a.PLAIN, *a.LARGER_EPS, a.AT_LARGEST]
    wrong = [store.wrong[n] for n in names if n in store.wrong]
    rising = [at_most(beats(few, many), ONLY) for few, many in itertools.pairwise(wrong)]
    right = ~wrong[-1]
    errors = " ".join(f"{100 * w.float().mean():.0f}" for w in wrong)
    return check(
        4,
        "error rises with eps, to 100%",
        f"{errors}; right at 128/255: {int(right.sum())} of {len(right)}",
        worst([*rising, at_most(share(right), ONLY)]),
        passed="with a large eps the attack breaks everything",
        failed="a larger eps breaks fewer images: the attack gets stuck"
        if FAIL in rising
        else "images survive where no network can be right: the attack is weak",
        unknown="too few images to exclude a few that never break",
    )


def gradient_free(store: Store) -> Check:
    """5: attacks that use no gradient of this network break nothing new."""
    known, square = a.white_box(store), store.numbers[a.SQUARE]
    others = [n for n in store.wrong if n.startswith((a.TRANSFER, a.NOISE))]
    found = {n: beats(known | store.wrong[n], known) for n in (*others, a.SQUARE)}
    best = max(others, key=lambda n: found[n].value)
    weak = bool(square["survivors"]) and 4 * square["control broken"] < square["control"]
    return check(
        5,
        "attacks without its gradient add nothing",
        f"Square {found[a.SQUARE]}; {best} {found[best]}; Square breaks {square['broken']} of "
        f"{square['survivors']} survivors and {square['control broken']} of {square['control']} others",
        worst([*(at_most(d, ONLY) for d in found.values()), *([UNKNOWN] if weak else [])]),
        passed="no image survives only because the gradient is useless",
        failed="images that survive white-box attacks break without the gradient: it is masked",
        unknown="Square breaks hardly any image that white-box attacks break: too weak to tell"
        if weak
        else "too few images, or a few that only these attacks break",
    )


def transfer(store: Store) -> Check:
    """6: images made for another network are weaker."""
    found = {
        n: beats(w, store.wrong[a.PLAIN])
        for n, w in sorted(store.wrong.items(), key=lambda item: item[0])
        if n.startswith(a.TRANSFER)
    }
    return check(
        6,
        "transferred images are weaker",
        "; ".join(f"{n.removeprefix(a.TRANSFER)} {d}" for n, d in found.items()) or "no surrogate given",
        worst(negative(d) for d in found.values()),
        passed="its own gradients beat those of another network",
        failed="the gradients of another network are better: its own are masked",
        unknown="transfer and white-box attacks are too close to tell"
        if found
        else "give networks to attack from with --surrogate",
    )


def random_noise(store: Store) -> Check:
    """7: random draws are weaker."""
    d = beats(store.wrong[a.NOISE], store.wrong[a.PLAIN])
    return check(
        7,
        "random noise is weaker",
        f"noise minus PGD {d}",
        negative(d),
        passed="PGD beats chance",
        failed="chance beats PGD",
        unknown="PGD hardly beats chance, or there are too few images",
    )


def losses(store: Store) -> Check:
    """8: all losses agree with cross-entropy, and so do AutoAttack and all attacks together."""
    attacks = {n.removeprefix("PGD, "): store.wrong[n] for n in (*a.LOSSES, *a.TARGETED, a.AUTOATTACK)}
    attacks["all attacks together"] = store.broken()
    found = {n: beats(wrong, store.wrong[a.PLAIN]) for n, wrong in attacks.items()}
    gaps = {n: max(d, beats(store.wrong[a.PLAIN], attacks[n])) for n, d in found.items()}
    verdicts = {n: at_most(gap, LOSS) for n, gap in gaps.items()}
    verdict = worst(verdicts.values())
    farthest = max((n for n in found if verdicts[n] == verdict), key=lambda n: gaps[n].value)
    return check(
        8,
        "losses agree",
        "; ".join(f"{n} {d}" for n, d in found.items()),
        verdict,
        passed="the error does not depend on the loss",
        failed=f"{farthest} and plain cross-entropy differ: one of them misses images",
        unknown="too few images to say that they agree",
    )


CHECKS = (
    single_step,
    twice_the_steps,
    restarts_and_step_sizes,
    larger_eps,
    gradient_free,
    transfer,
    random_noise,
    losses,
    gradient,
    adaptive,
    gate,
    ways,
)
