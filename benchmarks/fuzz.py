"""Tries the surgery on random networks of which it is known what is right.

`python -m benchmarks.fuzz --networks 3000 --seed 0` writes networks, edits their blocks, and compares each
with a twin in which the generator has put the new activation itself. It prints how many blocks were edited
rightly, refused for which reason, and wrong; and of each wrong network the seed and the source.
"""

import argparse
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from tests.helpers.random_networks import write
from tests.helpers.random_oracle import Verdict, judge


def reason(verdict: Verdict) -> str:
    """Why a block was refused, without its names and numbers."""
    lines = verdict.why.splitlines() or [""]
    text = lines[1] if lines[0].startswith("cannot replace") and len(lines) > 1 else lines[0]
    text = re.sub(r"\S*/\S*|G\d+\.B\d+(: (G\d+\.B\d+ )?\(\S+\))?|\(\w+(\.<?\w+>?)+\)|'\w+'", "_", text)
    return re.sub(r"\d+", "0", text)[:110]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=300, help="how many (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first; each has the next one (%(default)s)"
    )
    parser.add_argument("--brief", action="store_true", help="print no sources")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results, reasons, parts = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(options.seed, options.seed + options.networks), unit="network"):
            written = write(seed)
            try:
                verdicts = judge(written, Path(folder))
            except AssertionError as error:  # the generator's twin is another network
                results["without a truth"] += 1
                tqdm.write(f"seed {seed}: {error}")
                continue
            for verdict in verdicts:
                results[verdict.result] += 1
                if verdict.result.startswith("refused"):
                    reasons[verdict.result, reason(verdict)] += 1
                if verdict.result == "wrong":
                    parts.update(verdict.parts)
                    tqdm.write(
                        f"wrong: seed {seed} {verdict.label}: {verdict.why}\n  {'; '.join(verdict.parts)}"
                    )
            if not options.brief and any(v.result == "wrong" for v in verdicts):
                tqdm.write(written.text)
    print(f"{options.networks} networks: " + ", ".join(f"{n} {r}" for r, n in results.items()))
    for (result, why), count in reasons.most_common():
        print(f"{count:6} {result}: {why}")
    if results["wrong"]:
        print("parts of the wrong ones:", ", ".join(f"{p} {n}" for p, n in parts.most_common()))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
