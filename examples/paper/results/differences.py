"""Differences between networks, image by image: of each seed, and of all seeds of a row."""

from collections.abc import Iterator, Mapping

from examples.paper.common.statistics import (
    Pair,
    holm,
    mean_difference,
    p_value,
    pair_of,
    paired,
    root_mean_square,
    rounded,
)
from examples.paper.results.cells import MISSING, Result, Rows, attacks_of, markdown
from examples.paper.results.queue import Table

Pairs = Mapping[tuple[str, int], tuple[Result, Result]]  # by label and seed: a result, and what it is minus


def differences(table: Table, rows: Rows) -> Iterator[str]:
    """Each row minus the last `base` above it, or the first; then each row minus the table's `against`."""
    starts = [i for i, (row, _) in enumerate(rows) if i == 0 or row.base]
    groups = [rows[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    if table.against is not None:
        groups.append(sorted(rows, key=lambda r: r[0].label != table.against))  # stable: it comes first
    for group in groups:
        pairs = pairs_with_first(group)
        known = {
            a for result, base in pairs.values() for a in result["errors"].keys() & base["errors"].keys()
        }
        if attacks := [a for a in attacks_of(group[:1]) if a in known]:
            yield difference_table(group[0][0].label, pairs, attacks)


def trained_again(pairs: Pairs) -> Iterator[str]:
    """Networks minus what the same training gave before: what chance does to one network."""
    if pairs:
        measured = [result["errors"] for pair in pairs.values() for result in pair]
        attacks = [a for a in measured[0] if all(a in errors for errors in measured)]
        yield difference_table("an earlier training with the same seed", pairs, attacks)
        found = {a: [pair_of(*pair, a) for pair in pairs.values()] for a in attacks}
        typical = [f"{a} {rounded(root_mean_square(of))}" for a, of in found.items()]
        yield f"Root of the mean square of these {len(pairs)}: {'; '.join(typical)}.\n"


def pairs_with_first(rows: Rows) -> dict[tuple[str, int], tuple[Result, Result]]:
    """By label and seed, each result of the other rows with the first row's result of the same seed."""
    (_, first), *others = rows
    base = {r["settings"]["seed"]: r for r in first}
    return {
        (row.label, seed): (result, base[seed])
        for row, found in others
        for result in found
        if (seed := result["settings"]["seed"]) in base
    }


def difference_table(base: str, pairs: Pairs, attacks: list[str]) -> str:
    """A row of each label and seed, and of each label with several seeds their mean; Holm's test in bold."""
    wrong = {
        (label, seed, attack): pair_of(*results, attack)
        for (label, seed), results in pairs.items()
        for attack in attacks
        if all(attack in result["errors"] for result in results)
    }
    cells = dict(zip(wrong, marked(list(wrong.values())), strict=True))
    labels, lines = [f"points, minus {base}"], [attacks]
    for label in dict.fromkeys(label for label, _ in pairs):
        seeds = [seed for name, seed in pairs if name == label]
        for seed in seeds:
            labels.append(f"{label}, seed {seed}{' alone' if len(seeds) == 1 else ''}")
            lines.append([cells.get((label, seed, a), MISSING) for a in attacks])
        if len(seeds) > 1:
            labels.append(f"{label}, mean of {len(seeds)} seeds")
            found = [[wrong.get((label, seed, a)) for seed in seeds] for a in attacks]
            lines.append([mean_difference([p for p in ps if p]) if all(ps) else MISSING for ps in found])
    return markdown(labels, lines)


def marked(pairs: list[Pair]) -> list[str]:
    """Differences as cells of one table, in bold those that Holm's correction for their number leaves."""
    bold = holm([p_value(pair) for pair in pairs])
    return [f"**{paired(p)}**" if b else str(paired(p)) for p, b in zip(pairs, bold, strict=True)]
