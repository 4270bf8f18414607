"""The sections of the page on activations in other networks, from the results of `controls transfer`."""

from collections.abc import Iterator
from pathlib import Path

from examples.paper.common.statistics import mean_difference, rounded, with_seeds
from examples.paper.controls.experiment import Results, pairs_of, read
from examples.paper.controls.transfers import DESTINATIONS, FROZEN, HALF, RELU, SHUFFLED, THERE
from examples.paper.results.cells import markdown
from examples.paper.results.queue import FOLDERS

HEAD = """## Frozen sets in other networks

Each network is trained on 2,000 test images that no set has seen, the last ones, and attacked on the first
2,000, by PGD-10 at 8/255, judged at every step. Errors are by seed. Differences are means over the seeds, in
points of error, with 95% intervals over images, and over images and trainings. [When a set helps, and when it
hurts](robustness.md#elsewhere-what-counts-as-help), was written down on 2026-11-29, when the networks of the
day before were known and all later ones were not. Commands for sets and networks of other runs are there too.
"""
SHARED = ("epochs", "limit", "batch_size", "lr", "dataset", "trained", "images")  # options of all networks


def elsewhere(folder: Path) -> Iterator[str]:
    """A table of errors and one of differences for each destination that has results in the folder."""
    found = {to: results for to in DESTINATIONS if (results := results_of(to, folder))}
    if found:
        yield HEAD
    for to, results in found.items():
        first = results[RELU][0]
        epochs, machine = first["options"]["epochs"], f"{first['machine']}, torch {first['torch']}"
        dates = sorted({r["date"] for rs in results.values() for r in rs})
        yield f"### {DESTINATIONS[to].what[0].upper()}{DESTINATIONS[to].what[1:]}\n"
        yield _errors(results)
        yield _differences(results)
        for label in results:
            if said := verdict(results, label):
                yield f"**{label}: {said}.**\n"
        command = f"controls transfer {to} --data DATA/{FOLDERS[DESTINATIONS[to].dataset]}"
        yield (
            f"{epochs} epochs; {machine}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
            f"`python -m examples.paper {command}`.\n"
        )


def results_of(to: str, folder: Path) -> Results:
    """By label, the results of one destination, in the order of their seeds; ReLU and the constant first.

    Raises `ValueError` for a file that is not a result, or if networks were trained with other options.
    """
    results: Results = {}
    for path in sorted(folder.glob(f"transfer-{to}-*-seed*.json")):
        result = read(path)
        results.setdefault(result["label"], []).append(result)
    for found in results.values():
        found.sort(key=lambda r: r["options"]["seed"])
    options = [r["options"] for found in results.values() for r in found]
    if unlike := [k for k in SHARED if len({str(o.get(k)) for o in options}) > 1]:
        raise ValueError(f"{folder}: the results of transfer {to} differ in {', '.join(unlike)}")
    seeds = {label: [r["options"]["seed"] for r in rs] for label, rs in results.items()}
    if any(s != seeds.get(RELU) for s in seeds.values()):
        raise ValueError(f"{folder}: the networks of transfer {to} have different seeds: {seeds}")
    return dict(sorted(results.items(), key=lambda item: _order(item[0])))


def verdict(results: Results, label: str) -> str:
    """Whether a frozen set helps, by the rule of docs/robustness.md; "" for another network, or for one seed.

    It helps if it makes fewer errors under attack than ReLU, than the constant and than its numbers shuffled;
    it hurts if it makes more than one of the first two. Each time the interval with seeds has to agree.
    """
    others = (RELU, HALF, _shuffled(label))
    if others[-1] not in results or len(results[label]) < 2:
        return ""
    *_, attack = results[RELU][0]["errors"]
    found = [with_seeds(pairs_of(results[label], results[other], attack)) for other in others]
    if any(d.low > 0 for d in found[:2]):
        return "it hurts"
    return "it helps" if all(d.high < 0 for d in found) else "no help is shown, and no harm"


def _order(label: str) -> tuple[int, str]:
    kinds = [label == RELU, label == HALF, label.endswith(FROZEN.format("")), label == THERE, True]
    return kinds.index(True), label


def _errors(results: Results) -> str:
    attacks = list(results[RELU][0]["errors"])
    cells = [
        [", ".join(f"{rounded(r['errors'][a]['error'])}%" for r in found) for a in attacks]
        for found in results.values()
    ]
    return markdown(["", *results], [attacks, *cells])


def _differences(results: Results) -> str:
    """Each network minus ReLU, minus ReLU times one half, and a set minus its numbers shuffled."""
    attacks = list(results[RELU][0]["errors"])
    heads = [f"{a}, minus {other}" for a in attacks for other in (RELU, HALF, "its numbers shuffled")]
    others = {label: (RELU, HALF, _shuffled(label)) for label in results if label != RELU}
    lines = [
        [
            mean_difference(pairs_of(found, results[other], a)) if other in results and other != label else ""
            for a in attacks
            for other in against
        ]
        for label, against in others.items()
        for found in [results[label]]
    ]
    return markdown(["points", *others], [heads, *lines])


def _shuffled(label: str) -> str:
    """Label of the control of a frozen set; of other networks there is none."""
    name = label.removesuffix(FROZEN.format(""))
    return SHUFFLED.format(name) if name != label else ""
