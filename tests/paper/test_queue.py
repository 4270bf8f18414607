"""The queue: its entries, and errors for wrong ones."""

import dataclasses
import json
import re

import pytest
import torch

from examples.paper.common.models import build
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.results.cells import ATTACKS
from examples.paper.results.queue import read_queue
from examples.paper.results.state import RESULTS, changes, lacks
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta, SpartaSet
from tests.helpers.queues import SMALL, call

QUEUE = read_queue()
# one entry of each network, of each recipe, and one around a trained set
DISTINCT = {r.recipe: name for name, r in QUEUE.runs.items()} | {
    (r.arch, r.activation, r.sites, bool(r.set)): name for name, r in QUEUE.runs.items()
}


@pytest.mark.parametrize("name", sorted({*DISTINCT.values()}))
def test_every_kind_of_entry_takes_a_step(name, tmp_path):
    r, pretrained = QUEUE.runs[name], None
    if r.set:
        pretrained = str(tmp_path / "set")
        SpartaSet({f"G{i + 1}.B2": Sparta(8 * 2**i) for i in range(4)}).save_pretrained(pretrained)
    model = build(r.arch, r.activation, r.sites, width=8, pretrained=pretrained, dataset=r.dataset)
    recipe = dataclasses.replace(RECIPES[r.recipe], epochs=r.epochs, batch_size=2)
    recipe = dataclasses.replace(recipe, steps=min(recipe.steps, 1))
    total = Trainer(model, recipe, 2).step(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    assert torch.isfinite(total).all()
    if r.activation != "relu" and r.sites == "*act*":
        assert not any(type(m) is torch.nn.ReLU for m in model.modules())


@pytest.mark.parametrize(
    ("number", "label", "numbers"),
    [
        ("3", "N = 4", [30.17, 66.58, 73.45, 15.07]),
        ("4", "Swish-ReLU", [30.10, 67.70, 75.07]),
        ("6, ResNet-34, adversarial training", "SPARTA", [29.17, 64.13, 72.91, 14.47]),
        ("7", "ResNet-34, SPARTA", [27.73, 42.23, 46.40, 23.84]),
        ("8, with MNIST-M", "CIFAR-10, SPARTA", [29.31, 65.81, 72.55, 15.48]),
        ("9", "G{1,2,3,4}.B{1,2}", [31.32, 65.83, 72.28, 16.70]),
    ],
)
def test_the_papers_numbers(number, label, numbers):
    rows = {row.label: row for row in QUEUE.tables[number].rows}
    assert rows[label].paper == numbers


def test_what_is_not_of_the_whole_data_says_so():
    titles = {"smoke": "on the sample", "long": "10,000 training images"}
    parts = {r.name.split("-")[0]: r.limit for r in QUEUE.runs.values() if r.sample or r.limit}
    assert parts == {"smoke": 200, "long": 10_000}
    for budget, words in titles.items():
        (table,) = [t for t in QUEUE.tables.values() if t.budget == budget]
        assert words in table.title


def test_every_run_is_in_a_table():
    shown = {
        run.name for table in QUEUE.tables.values() for row in table.rows for run in QUEUE.runs_of(table, row)
    }
    assert shown == set(QUEUE.runs)


@pytest.mark.parametrize("table", QUEUE.tables.values(), ids=lambda table: table.number)
def test_a_base_and_what_is_compared_with_it_are_of_one_network_and_data_set(table):
    for row in table.rows:
        runs = QUEUE.runs_of(table, row)
        if row is table.rows[0] or row.base:
            base = runs[0]
        for run in runs:
            assert (run.dataset, run.width) == (base.dataset, base.width), row
            assert run.arch.removesuffix("-wide") == base.arch, row


@pytest.mark.parametrize(
    "path",
    [*RESULTS.glob("*.json"), *RESULTS.glob("earlier/*.json")],
    ids=lambda path: f"{path.parent.stem}-{path.stem}",
)
def test_a_filed_result_is_of_its_run(path):
    run, filed = QUEUE.runs[path.stem], json.loads(path.read_text())
    assert not changes(run, filed)
    then = {"settings": filed["settings"] | {"evaluation": "full", "seed": 9}}
    assert changes(run, then) == f"evaluation was 'full', is {run.evaluation!r}, seed was 9, is {run.seed}"


def test_a_result_that_lacks_an_attack_of_its_protocol_says_which():
    run, filed = QUEUE.runs["w16-relu"], json.loads((RESULTS / "w16-relu.json").read_text())
    protocol = PROTOCOLS["field"]
    names = [a.name for a in protocol.attacks()] + [*protocol.worst_cases()]
    assert not lacks(QUEUE, run, filed | {"errors": {n: {} for n in names}})
    few = [n for n in names if n not in ("clean", "targeted PGD-30, 16/255")]
    assert lacks(QUEUE, run, filed | {"errors": {n: {} for n in few}}) == (
        "it lacks clean, targeted PGD-30, 16/255"
    )


def test_every_attacked_column_of_a_table_is_measured_by_its_protocol():
    for table in QUEUE.tables.values():
        for row in table.rows:
            for run in QUEUE.runs_of(table, row):
                protocol = PROTOCOLS[run.evaluation]
                names = {a.name for a in protocol.attacks()} | protocol.worst_cases().keys()
                assert {ATTACKS.get(column, column) for column in table.columns} <= names, table.number


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        (
            "limit = 40",
            "limit = 40\nvalidation = 0",
            "runs.short-relu.validation: Input should be greater than 0; runs.short-sparta.validation: ",
        ),
        ("limit = 40", "limit = 40\nvalidation = true", "validation: Input should be a valid integer"),
        ("width = 8", 'width = "8"', "runs.short-relu.width: Input should be a valid integer"),
        ("seed = 0", "seeds = 0", "seed: Field required; runs.short-relu.seeds: Extra inputs are not"),
        ('"quick"', '"quik"', "evaluation: unknown 'quik'; known: field, ship, quick"),
        ("short-relu =", "fast-relu =", "runs.fast-relu.epochs: Field required"),
        ('set = "short-sparta"', 'set = "x"', "runs.short-sparta-from-sparta.set: no run above it is 'x'"),
        ('title = "T"\n', "", "tables.2.title: Field required"),
        (
            " ]\n",
            ' ]\nfigure = ["clean"]\nagainst = 3\n',
            "tables.2.against: Input should be a valid string; tables.2.figure: Extra inputs are not",
        ),
        (" ]\n", ' ]\nagainst = "ELU"\n', "tables.2: against: no row has the label 'ELU'; labels: SPARTA"),
        (', run = "sparta"', "", "tables.2.rows.0.run: Field required"),
        ('run = "sparta"', 'run = "x"', "tables.2: no run short-x"),
        ("paper = [15.48]", "paper = [1, 2]", "tables.2: paper: 1 numbers are needed, one a column: SPARTA"),
        ("paper = [15.48]", "best = true", "tables.2: best, but no validation: short-sparta"),
        ("limit = 40", "limit = -5", "runs.short-relu.limit: Input should be greater than or equal to 0"),
        ("seed = 0", "seed = 99999999999999999999", "runs.short-relu.seed: Input should be less than"),
        ("seed = 0", "seed = -1", "runs.short-relu.seed: Input should be greater than or equal to 0"),
        ("short-relu = {", 'short-relu = { name = "../x",', "runs.short-relu.name: String should match"),
        ("seed = 0", "seed = '\udcff'", "queue.toml is not TOML: 'utf-8' codec can't decode"),
        ("[defaults]", "[default]", "defaults: Field required; default: Extra inputs are not"),
    ],
)
def test_an_error_names_every_wrong_entry_before_anything_runs(place, old, new, wrong):
    assert old in SMALL
    (place / "queue.toml").write_bytes(SMALL.replace(old, new).encode(errors="surrogateescape"))
    for name in ("tables", "status"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            call(place, name)
    assert [p.name for p in place.iterdir()] == ["queue.toml"]
