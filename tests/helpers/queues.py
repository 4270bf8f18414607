"""A small queue, and its commands on it."""

import json

import pytest
import torch

from examples.paper.common.records import packed
from examples.paper.evaluation.protocols import PROTOCOLS, Protocol
from examples.paper.results import command
from examples.paper.results.queue import read_queue

QUICK = Protocol("quick", limit=10, paper_steps=[2], steps=2)
SMALL = """
[budgets]
short = { epochs = 1 }
[defaults]
dataset = "cifar10"
arch = "resnet18"
width = 8
sites = "G*.B-1"
recipe = "fast"
seed = 0
evaluation = "quick"
sample = true
limit = 40
[runs]
short-relu = { activation = "relu" }
short-sparta = { activation = "sparta" }
short-sparta-from-sparta = { activation = "sparta", set = "short-sparta" }
[tables.2]
title = "T"
columns = ["clean"]
rows = [ { label = "SPARTA", run = "sparta", paper = [15.48] } ]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small queue, of runs on a few images of the sample."""
    monkeypatch.setitem(PROTOCOLS, "quick", QUICK)
    (tmp_path / "queue.toml").write_text(SMALL)
    return tmp_path


def call(place, name, *more):
    """A command of the queue in a folder."""
    folders = ["--queue", place / "queue.toml", "--results", place / "results"]
    folders += [] if name == "tables" else ["--runs", place / "runs"]
    getattr(command, name)([str(a) for a in (*more, *folders)])


def run(place, *more):
    """`run` on the CPU."""
    call(place, "run", *more, "--device", "cpu")


def page(place):
    """What `tables` writes."""
    call(place, "tables")
    return (place / "results.md").read_text()


def result(error, **more):
    """A filed result, of 500 images under every attack."""
    entry = {"error": error, "low": error - 0.01, "high": error + 0.02, "images": 500}
    entry["wrong"] = packed(torch.arange(500) < round(500 * error))
    attacks = ("clean", "targeted PGD-10, 16/255", "worst case, 8/255")
    numbers = {"parameters": 1234, "multiply-adds": 5_600_000, "seconds per epoch": 2.5}
    return {
        "errors": dict.fromkeys(attacks, entry),
        **numbers,
        "last epoch": {"epoch": 1.0},
        "machine": "a GPU",
        "test images": "all",
        **more,
    }


def file_errors(place, errors):
    """File results of the queue's short runs with these errors."""
    queue = read_queue(place / "queue.toml")
    (place / "results").mkdir(exist_ok=True)
    for name, error in errors.items():
        filed = result(error, settings=queue.runs[f"short-{name}"].settings())
        (place / f"results/short-{name}.json").write_text(json.dumps(filed))
