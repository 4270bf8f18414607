"""The sets that ship with the package or are published on the Hub, and whether they are here."""

import os
from dataclasses import dataclass

from sparta_act.pretrained.fetching import cached
from sparta_act.pretrained.folder import CONFIG, WEIGHTS
from sparta_act.pretrained.hub import ORGANIZATION, PUBLISHED, SETS, SHIPPED, Found

PACKAGE, HUB = "in the package", "on the Hub"


@dataclass(frozen=True)
class ListedSet:
    """A set of ours. Errors are in percent, of the network that it was trained in and of its two controls.

    Those are the same network with ReLU, and with ReLU times one half at the same sites.
    """

    name: str
    where: str  # "in the package" or "on the Hub"
    channels: dict[str, int]  # by site
    dataset: str
    eps: str  # of the worst case: the bound of its attacks, and how many test images they attacked
    images: int
    clean: float
    worst_case: float
    relu_clean: float | None
    relu_worst_case: float | None
    half_clean: float | None
    half_worst_case: float | None


class SetList(list[ListedSet]):
    """The sets of ours; prints as a table."""

    def __repr__(self) -> str:
        rows = [("name", "channels", "data set", "clean error", "worst-case error", "")]
        for s in self:
            channels = ", ".join(map(str, s.channels.values()))
            clean = _error(s.clean, s.relu_clean, s.half_clean)
            worst = _error(s.worst_case, s.relu_worst_case, s.half_worst_case)
            worst += f" at {s.eps}, {s.images:,} images"
            rows.append((s.name, channels, s.dataset, clean, worst, s.where))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def list_sets() -> SetList:
    """List the sets that `Sparta.from_pretrained` knows by a short name; asks no network.

    >>> [s.name for s in list_sets()]
    ['cifar10-resnet18', 'cifar10-resnet18-w16']
    """
    return SetList(
        ListedSet(
            name=name,
            where=PACKAGE if os.path.isdir(SETS / name) else HUB,
            **{key: value for key, value in known.items() if key != "sha256"},
        )
        for name, known in PUBLISHED.items()
    )


def check_files(name: str) -> str:
    """Where the files of a set of ours are on this machine, in words; asks no network.

    Raises `WeightsError` where one is missing or changed.
    """
    if os.path.isdir(SETS / name):
        Found(name, SETS / name, hashes=SHIPPED[name]).check()
        return f"in {SETS / name}, sha256 as published"
    folder = cached(f"{ORGANIZATION}/{name}", None, None)
    if folder is None:
        return "not downloaded yet"
    Found(name, folder, hashes={file: SHIPPED[name][file] for file in (CONFIG, WEIGHTS)}).check()
    return f"downloaded to {folder}, sha256 as published"


def _error(ours: float, relu: float | None, half: float | None) -> str:
    controls = [f"{name} {error}%" for name, error in (("ReLU", relu), ("halved", half)) if error is not None]
    return f"{ours}% ({', '.join(controls)})" if controls else f"{ours}%"
