"""Tries the surgery on the convolutional networks of public libraries, and writes down what came of it.

`python benchmarks/zoo.py` builds, with random weights, those of torchvision and transformers, the smallest of
each family of timm that has ReLU, and U-Nets and 3-D networks of segmentation_models_pytorch and monai. In
each, a probe takes the place of the last activation of every block, and of one more site by its name.
`oracle.py` knows from a recording what must come out; it must be the same in every bit, in evaluation and in
training mode, and restoring must bring back the first output. The table goes to docs/zoo.md. About 25 minutes
on two cores.
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

from benchmarks.catalogue import BUILDERS, Network, build, names, smallest, weight_of
from benchmarks.oracle import Verdict, judge
from examples.paper.common.cli import at_least
from examples.paper.common.console import stamp

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
OPENING = """# The surgery on other people's networks

Made by `python benchmarks/zoo.py`; {stamp}. Random weights, seed 0.

In each network a probe that no network has takes the place of the last activation of every block, and then of
one more site by its name. A recording of all activation calls, which shares no code with the surgery, says
which calls these are; the untouched network is run again with just those calls computed otherwise. **Right**
means: the changed network gives the same output in every bit, in evaluation and in training mode, and the
restored one the first output. **Refused** means that nothing was changed and the user is told why. Where a
network has no ReLU on feature maps, the activation it has most of was asked for by name (`kinds=`).

{summary}

`blocks` are the numbers of blocks in each group; `other` the sites that go by their names. A detector is
judged by its `backbone`, the rest of it needs boxes. In {partly} of the networks that are right, some blocks
have another activation than the one asked for: these were refused, and the others replaced.
"""

A, T = TypeVar("A"), TypeVar("T")


def judged(network: Network) -> Verdict:
    """Try one network, first without an example, and with one if the error asks for it."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.collect()
    try:
        model, example = build(network)
        verdict = judge(model, example)
        if verdict.result == "refused" and "example=" in verdict.why:
            again = judge(model, example, given=example)
            verdict = again._replace(why="; ".join(filter(None, [again.why, "with `example=`"])))
    except Exception as error:  # one network that fails otherwise must not end the rest
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    return verdict


def mapped(
    function: Callable[[A], T], items: Iterable[A], jobs: int, title: str, told: Callable[[A, T], str]
) -> dict[A, T]:
    """Apply a function in several processes; with a bar, and a line for each result that is worth one."""
    items = list(items)
    results = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(function, item): item for item in items}
        for done in tqdm(as_completed(running), total=len(items), desc=title, unit="network"):
            results[running[done]] = done.result()
            if line := told(running[done], results[running[done]]):
                tqdm.write(line)
    return {item: results[item] for item in items}


def chosen(libraries: list[str], pattern: str, jobs: int) -> list[Network]:
    """The networks to try, of the libraries that are installed."""
    found = []
    for library in libraries:
        try:
            offered = names(library)
        except ImportError as error:
            print(f"{library}: not installed ({error}); left out. `make zoo` installs it")
            continue
        offered = [n for n in offered if fnmatchcase(n, pattern)]
        if library == "timm" and pattern == "*":
            offered = smallest(mapped(weight_of, offered, jobs, "timm: who has ReLU", lambda n, w: ""))
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
    told = ", ".join(f"{k} {v}" for k, v in stamp().items())
    partly = sum(v.result == "right" and v.replaced < _blocks(v) for v in verdicts.values())
    text = [OPENING.format(stamp=told, summary="\n".join(rows), partly=partly).rstrip()]
    for library in libraries:
        text += [f"\n## {library}\n", "| network | activation | blocks | other | edit | result |"]
        text.append("| --- | --- | --- | --- | --- | --- |")
        for network, v in verdicts.items():
            if network.package == library:
                cells = [network.name, v.kind, v.groups, str(v.others), v.edits, _told(v)]
                text.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(text) + "\n"


def _blocks(verdict: Verdict) -> int:
    return sum(map(int, verdict.groups.split("+"))) if verdict.groups else 0


def _told(verdict: Verdict) -> str:
    result = "**wrong**" if verdict.result == "wrong" else verdict.result
    if verdict.result == "right" and verdict.replaced < _blocks(verdict):
        result += f" on {verdict.replaced} of {_blocks(verdict)} blocks, the rest refused"
    why = re.sub(r"/\S*/site-packages/", "", " ".join(verdict.why.split()))
    return f"{result}: {why}" if why else result


def _line(network: Network, verdict: Verdict) -> str:
    found = f"{verdict.groups or 'no'} blocks, {verdict.others} other sites"
    return f"{network.package} {network.name}: {verdict.kind}, {found}: {_told(verdict)}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library", dest="libraries", nargs="+", default=[*BUILDERS], choices=[*BUILDERS], help="all"
    )
    parser.add_argument(
        "--only", default="*", help="names by shell pattern, e.g. 'resnet*'; of timm, all of them"
    )
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, help="where the table goes (docs/zoo.md, if all are tried)")
    options = parser.parse_args(arguments)
    networks = chosen(options.libraries, options.only, options.jobs)
    if not networks:
        parser.error(f"no network of {', '.join(options.libraries)} is called {options.only}")
    verdicts = mapped(judged, networks, options.jobs, "surgery", _line)
    out = options.out or (PAGE if options.only == "*" and set(options.libraries) == {*BUILDERS} else None)
    if out:
        out.write_text(page(verdicts))
    print(", ".join(f"{n} {result}" for result, n in Counter(v.result for v in verdicts.values()).items()))
    if any(v.result == "wrong" for v in verdicts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
