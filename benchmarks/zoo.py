"""Tries the surgery on the convolutional networks of public libraries, and writes the table of docs/zoo.md.

`python -m benchmarks.zoo` builds, with random weights, the networks of torchvision and transformers, the
smallest of each timm family with ReLU, and U-Nets and 3-D networks of segmentation_models_pytorch and monai.
In each it replaces the last activation of every block by a probe, then one more site by its name, then "all".
`oracle.py` has the expected output from a recording. All bits must agree, in evaluation and in training mode,
and restoring must bring back the first output.
"""

import argparse
import gc
import multiprocessing
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from benchmarks.catalogue import BUILDERS, Network, build, names, size_of, smallest
from benchmarks.oracle import Verdict, judge
from examples.paper.common.atomic import write_text
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import stamp

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
OPENING = """# The surgery on third-party networks

Written by `python -m benchmarks.zoo`; {stamp}. Random weights, seed 0.

In each network `replace_relus` puts a probe, an activation that no network has, at the end of every block,
then at one more site by its name, then at "all". A recording of all activation calls, which shares no code
with the surgery, finds these calls, and the untouched network runs again with exactly these calls computed by
the probe. **Right**: the changed network gives the same output in all bits, in evaluation and in training
mode, the restored network gives the first output, and "all" leaves no call on a map. **Refused**: nothing was
changed, and the error says why. In a network without ReLU on feature maps, its most frequent activation was
replaced (`kinds=`).

{summary}

`blocks`: the number of blocks in each group; `other`: the sites without a label; `all`: how many calls on
feature maps `"all"` replaces (in evaluation and in training mode, where they differ); it was refused in
{refused} of {total} networks. Of a detector only the `backbone` is judged, as the rest needs boxes. In
{partly} of the right networks some blocks end in another activation than the requested one: these were
refused, and the others replaced.
"""

A, T = TypeVar("A"), TypeVar("T")


def judge_network(network: Network) -> Verdict:
    """Judge one network, first without an example, then with one if the error names `example=`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.collect()
    try:
        model, example = build(network)
        verdict = judge(model, example)
        if verdict.result == "refused" and "example=" in verdict.why:
            again = judge(model, example, given=example)
            verdict = again._replace(why="; ".join(filter(None, [again.why, "with `example=`"])))
    except Exception as error:  # one failing network must not end the others
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    return verdict


def mapped(
    function: Callable[[A], T], items: Iterable[A], jobs: int, title: str, line_of: Callable[[A, T], str]
) -> dict[A, T]:
    """Apply a function in several processes, with a progress bar, and print the lines of `line_of`."""
    items = list(items)
    results = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(function, item): item for item in items}
        for done in tqdm(as_completed(running), total=len(items), desc=title, unit="network"):
            results[running[done]] = done.result()
            if line := line_of(running[done], results[running[done]]):
                tqdm.write(line)
    return {item: results[item] for item in items}


def chosen(libraries: list[str], pattern: str, jobs: int) -> list[Network]:
    """The networks to try, from the installed libraries."""
    found = []
    for library in libraries:
        try:
            offered = names(library)
        except ImportError as error:
            print(f"{library}: not installed ({error}), omitted. `make zoo` installs it")
            continue
        offered = [n for n in offered if fnmatchcase(n, pattern)]
        if library == "timm" and pattern == "*":
            offered = smallest(mapped(size_of, offered, jobs, "timm: networks with ReLU", lambda n, w: ""))
        found += [Network(library, name) for name in offered]
    return found


def page(verdicts: dict[Network, Verdict]) -> str:
    """The table of all verdicts, as Markdown."""
    libraries = list(dict.fromkeys(n.package for n in verdicts))
    rows = ["| library | networks | right | refused | wrong |", "| --- | --- | --- | --- | --- |"]
    for library in libraries:
        count = Counter(v.result for n, v in verdicts.items() if n.package == library)
        cells = [f"{library} {version(library.replace('_', '-'))}", str(count.total())]
        rows.append(
            "| " + " | ".join([*cells, *(str(count[r]) for r in ("right", "refused", "wrong"))]) + " |"
        )
    total = Counter(v.result for v in verdicts.values())
    rows.append(
        f"| all | {total.total()} | {total['right']} ({total['right'] / total.total():.1%}) | "
        f"{total['refused']} | {total['wrong']} |"
    )
    conditions = ", ".join(f"{k} {v}" for k, v in stamp().items())
    partly = sum(v.result == "right" and v.replaced < _blocks(v) for v in verdicts.values())
    judged = [v.every for v in verdicts.values() if v.every]
    words = {"refused": judged.count("refused"), "total": len(judged), "partly": partly}
    text = [OPENING.format(stamp=conditions, summary="\n".join(rows), **words).rstrip()]
    for library in libraries:
        text += [f"\n## {library}\n", "| network | activation | blocks | other | all | edit | result |"]
        text.append("| --- | --- | --- | --- | --- | --- | --- |")
        for network, v in verdicts.items():
            if network.package == library:
                cells = [network.name, v.kind, v.groups, str(v.others), v.every, v.edits, _format_result(v)]
                text.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(text) + "\n"


def _blocks(verdict: Verdict) -> int:
    return sum(map(int, verdict.groups.split("+"))) if verdict.groups else 0


def _format_result(verdict: Verdict) -> str:
    result = "**wrong**" if verdict.result == "wrong" else verdict.result
    if verdict.result == "right" and verdict.replaced < _blocks(verdict):
        result += f" on {verdict.replaced} of {_blocks(verdict)} blocks, the rest refused"
    why = re.sub(r"/\S*/site-packages/", "", " ".join(verdict.why.split()))
    return f"{result}: {why}" if why else result


def _line(network: Network, verdict: Verdict) -> str:
    found = f"{verdict.groups or 'no'} blocks, {verdict.others} other sites, all: {verdict.every or 'none'}"
    return f"{network.package} {network.name}: {verdict.kind}, {found}: {_format_result(verdict)}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library", dest="libraries", nargs="+", default=[*BUILDERS], choices=[*BUILDERS], help="all"
    )
    parser.add_argument(
        "--only", default="*", help="names by shell pattern, e.g. 'resnet*'; of timm then all sizes"
    )
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, help="file of the table (docs/zoo.md, if all networks are tried)")
    options = parser.parse_args(arguments)
    networks = chosen(options.libraries, options.only, options.jobs)
    if not networks:
        parser.error(f"no network of {', '.join(options.libraries)} is called {options.only}")
    out = options.out or (PAGE if options.only == "*" and set(options.libraries) == {*BUILDERS} else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    verdicts = mapped(judge_network, networks, options.jobs, "surgery", _line)
    if out:
        write_text(out, page(verdicts))
    print(", ".join(f"{n} {result}" for result, n in Counter(v.result for v in verdicts.values()).items()))
    if any(v.result == "wrong" for v in verdicts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    with plain_errors():
        main()
