"""How much an audit attacks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sizes of the attacks; an audit with less than the default may miss masking."""

    steps: int = 50  # of PGD, each of size eps/4
    restarts: int = 10
    draws: int = 200  # of random noise
    queries: int = 5000  # of Square, per image
    control: int = 10  # images broken by white-box attacks that Square attacks too: can it break any?
    autoattack: int = 100  # steps of each white-box part of AutoAttack
    curve: int = 100  # images whose loss is plotted
