"""Evaluation protocols: which attacks measure a network, on how many test images, under a name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from examples.paper.evaluation.measure import MODERN, PAPER, Attack

ALL = 10**9  # images: more than any test split has
AUTOATTACK, WORST = "AutoAttack, 8/255", "worst case, 8/255"
WORST_OF_ALL = "worst case with AutoAttack, 8/255"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The attacks of one evaluation. The clean error is always of all test images."""

    name: str
    limit: int = 2000  # attack the first N test images
    autoattack: int = 0  # of them the first N by AutoAttack
    paper_steps: Sequence[int] = (10, 30, 50)  # of the targeted PGD at 16/255
    steps: int = 50  # of the attacks at 8/255, which judge an image at every step

    def attacks(self) -> list[Attack]:
        """All attacks, the clean images first."""
        attacks = last_step_attacks(self.paper_steps) | every_step_attacks(self.steps)
        found = [Attack("clean", {}, ALL), *(Attack(name, a, self.limit) for name, a in attacks.items())]
        few = min(self.autoattack, self.limit)
        return found + ([Attack(AUTOATTACK, {"eps": MODERN["eps"]}, few)] if few else [])

    def worst_cases(self) -> dict[str, list[str]]:
        """By name, the attacks of which any makes an image wrong."""
        names = ["clean", *every_step_attacks(self.steps)]
        return {WORST: names} | ({WORST_OF_ALL: [*names, AUTOATTACK]} if self.autoattack else {})


def last_step_attacks(steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Attacks by name, judged at the last step: the paper's targeted PGD at each number of steps."""
    return {f"targeted PGD-{k}, 16/255": {**PAPER, "steps": k} for k in steps}


def every_step_attacks(steps: int) -> dict[str, dict[str, Any]]:
    """Attacks by name, at 8/255, judged at every step: untargeted PGD, and PGD by targeted DLR."""
    attack = {"eps": MODERN["eps"], "step_size": MODERN["step_size"], "steps": steps}
    return {
        f"untargeted PGD-{steps}, 8/255": attack | {"loss": "cross-entropy"},
        f"targeted DLR PGD-{steps}, 8/255": attack | {"loss": "targeted DLR"},
    }


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("field"),
        Protocol("ship", autoattack=1000),
        Protocol("quick", limit=50, paper_steps=(2, 10), steps=5),
    )
}
