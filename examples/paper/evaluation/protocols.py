"""Evaluation protocols: which attacks measure a network, on how many test images, under a name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from examples.paper.evaluation.measure import MODERN, PAPER, Attack

ALL = 10**9  # images: more than any test split has


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The attacks of one evaluation; the defaults are the paper's targeted PGD and our untargeted PGD.

    With `every_step` they are untargeted PGD and targeted DLR PGD, `untargeted_steps` of each at 8/255. An
    image is then wrong if the network errs at any step, and the clean error is of all test images.
    """

    limit: int | None = None  # the first N test images; all without
    steps: Sequence[int] = (10, 30, 50)  # of the targeted PGD at 16/255
    untargeted_steps: int = 50
    restarts: int = 10  # of the untargeted PGD
    amp: str | None = (
        None  # "bf16": steps of PGD in bfloat16; whether an image is wrong is decided in float32
    )
    every_step: bool = False
    autoattack: bool = False  # standard AutoAttack at 8/255
    autoattack_limit: int | None = None  # the first N test images; as `limit` without

    def __post_init__(self) -> None:
        if self.every_step and self.amp:
            raise ValueError("attacks judged at every step take their steps in float32; leave out --amp")

    def attacks(self) -> list[Attack]:
        """All attacks, the clean images first."""
        images = self.limit or ALL
        if self.every_step:
            clean, attacks = Attack("clean", {}, ALL), every_step_attacks(self.untargeted_steps)
        else:
            clean = Attack("clean", {}, images)
            attacks = last_step_attacks(self.steps, self.untargeted_steps, self.restarts)
        more = {"amp": True} if self.amp else {}
        found = [clean, *(Attack(name, a | more, images) for name, a in attacks.items())]
        if self.autoattack:
            few = min(self.autoattack_limit or images, images)
            found.append(Attack("AutoAttack, 8/255", {"eps": 8 / 255}, few))
        return found


def last_step_attacks(
    steps: Sequence[int], untargeted_steps: int, restarts: int
) -> dict[str, dict[str, Any]]:
    """Attacks by name: the paper's targeted PGD at each number of steps, untargeted PGD at both bounds."""
    attacks = {f"targeted PGD-{k}, 16/255": {**PAPER, "steps": k} for k in steps}
    name = f"untargeted PGD-{untargeted_steps}{f' x {restarts}' if restarts > 1 else ''}"
    untargeted = {**MODERN, "steps": untargeted_steps, "restarts": restarts}
    return attacks | {f"{name}, {k}/255": untargeted | {"eps": k / 255} for k in (8, 16)}


def every_step_attacks(steps: int) -> dict[str, dict[str, Any]]:
    """Attacks by name, at 8/255, judged at every step: untargeted PGD, and PGD by targeted DLR."""
    attack = {"eps": MODERN["eps"], "step_size": MODERN["step_size"], "steps": steps}
    return {
        f"untargeted PGD-{steps}, 8/255": attack | {"loss": "cross-entropy"},
        f"targeted DLR PGD-{steps}, 8/255": attack | {"loss": "targeted DLR"},
    }


PROTOCOLS = {
    "standard": Protocol(amp="bf16", autoattack=True, autoattack_limit=1000),
    "full": Protocol(amp="bf16", autoattack=True),
    "cpu": Protocol(limit=2000, restarts=2, amp="bf16"),
    "field": Protocol(limit=2000, every_step=True),
    "quick": Protocol(limit=50, steps=(2, 10), untargeted_steps=5, restarts=2),
}

# `evaluation` of results and runs from before the protocols had names
OLD_NAMES = {
    "--amp bf16 --autoattack --autoattack-limit 1000": "standard",
    "--amp bf16 --autoattack": "full",
    "--limit 2000 --restarts 2 --amp bf16": "cpu",
    "--limit 2000 --protocol field": "field",
    "--limit 50 --steps 2 10 --untargeted-steps 5 --restarts 2": "quick",
}
