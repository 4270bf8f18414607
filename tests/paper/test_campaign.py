"""The queue, the states and the filing of examples/campaign.py, through its command line and real files."""

import dataclasses
import datetime
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from examples.paper.common import sets
from examples.paper.common.records import packed
from examples.paper.common.sets import in_pixels
from examples.paper.common.statistics import minus
from examples.paper.evaluation import evaluate
from examples.paper.results import campaign, export
from examples.paper.results.queue import State, lock, read_queue
from examples.paper.results.tables import left_out, render, saturated
from examples.paper.training import train
from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import hub
from tests.helpers.fixtures import write_parquet

ROOT = Path(__file__).parents[2]
QUEUE = read_queue()
SMALL = """
[epochs]
short = 1
[evaluations]
quick = "--limit 10 --steps 2 --untargeted-steps 2 --restarts 1"
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
[[tables]]
number = "2"
title = "T"
columns = ["clean"]
rows = [ { label = "SPARTA", run = "sparta", paper = [15.48] } ]
"""


@pytest.fixture
def place(tmp_path):
    """A small queue, of runs on a few images of the sample."""
    (tmp_path / "queue.toml").write_text(SMALL)
    return tmp_path


def call(place, *more):
    folders = ["--queue", place / "queue.toml", "--runs", place / "runs", "--results", place / "results"]
    campaign.main([str(a) for a in (*more, *folders)])


def run(place, *more):
    call(place, "run", *more, "--device", "cpu")


def change_entry(place):
    (place / "queue.toml").write_text(SMALL.replace('activation = "sparta"', 'activation = "sparta-static"'))


@pytest.mark.parametrize("name", QUEUE.runs)
def test_every_entry_takes_a_step(name, tmp_path):
    r, pretrained = QUEUE.runs[name], None
    if r.set:
        pretrained = str(tmp_path / "set")
        SpartaSet({f"G{i + 1}.B2": Sparta(8 * 2**i) for i in range(4)}).save_pretrained(pretrained)
    model = train.build(r.arch, r.activation, r.sites, width=8, pretrained=pretrained, dataset=r.dataset)
    recipe = dataclasses.replace(train.RECIPES[r.recipe], epochs=r.epochs, batch_size=2)
    recipe = dataclasses.replace(recipe, steps=min(recipe.steps, 1))
    total = train.Trainer(model, recipe, 2).step(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    assert torch.isfinite(total).all()
    if r.activation != "relu" and r.sites == "*act*":
        assert not any(type(m) is torch.nn.ReLU for m in model.modules())


def test_a_dependency_stands_before_its_dependents_and_learns_its_own_set():
    names = list(QUEUE.runs)
    for r in QUEUE.runs.values():
        if r.set:
            assert names.index(r.set) < names.index(r.name)
            assert QUEUE.runs[r.set].set is None
            assert QUEUE.runs[r.set].activation == r.activation


@pytest.mark.parametrize(
    ("number", "label", "numbers"),
    [
        ("3", "N = 4", [30.17, 66.58, 73.45, 15.07]),
        ("4", "Swish-ReLU", [30.10, 67.70, 75.07]),
        ("5", "FD", [16.45, 61.85, 69.45]),
        ("6, ResNet-34, adversarial training", "SPARTA", [29.17, 64.13, 72.91, 14.47]),
        ("7", "ResNet-34, SPARTA", [27.73, 42.23, 46.40, 23.84]),
        ("8", "SVHN, SPARTA of CIFAR-10", [16.59, 61.88, 69.45, 6.52]),
        ("9", "G{1,2,3,4}.B{1,2}", [31.32, 65.83, 72.28, 16.70]),
    ],
)
def test_the_papers_numbers(number, label, numbers):
    rows = {(t["number"], row["label"]): row for t in QUEUE.tables for row in t["rows"]}
    assert rows[number, label]["paper"] == numbers


def test_a_changed_entry_never_files_the_old_network(place, capsys):
    run(place, "short-sparta")
    change_entry(place)
    call(place)
    assert "changed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="begun otherwise: activation was 'sparta', is 'sparta-static'"):
        run(place, "short-sparta")
    filed = json.loads((place / "results/short-sparta.json").read_text())
    assert filed["settings"]["activation"] == "sparta"
    call(place, "tables")
    assert "| SPARTA | 15.48 | missing |" in (place / "results.md").read_text()


def test_a_transfer_run_never_takes_the_old_networks_set(place):
    run(place, "short-sparta")
    change_entry(place)
    with pytest.raises(ValueError, match="waiting for short-sparta, whose set is neither in"):
        run(place, "short-sparta-from-sparta")


def test_a_transfer_run_trains_around_the_frozen_set(place):
    with pytest.raises(ValueError, match="waiting for short-sparta"):
        run(place, "short-sparta-from-sparta")
    run(place, "short-sparta", "short-sparta-from-sparta")
    given, taken = (
        train.load_trained(place / f"runs/{n}/checkpoint.pt")[0].layer4[1].act2
        for n in ("short-sparta", "short-sparta-from-sparta")
    )
    assert taken.frozen
    torch.testing.assert_close(taken.conv3, given.conv3.half().float())
    assert not (place / "runs/short-sparta-from-sparta/set").exists()


SHIPPED = (
    SMALL.replace("short = 1", "short = 1\ncpu = 8")
    .replace(
        'short-sparta = { activation = "sparta" }',
        'cpu-sparta = { activation = "sparta", limit = 0, sample = false, validation = 500 }',
    )
    .replace('set = "short-sparta"', 'set = "cpu-sparta"')
)


@pytest.fixture
def ours(place, monkeypatch):
    """A set of this package, as `cpu-sparta` of `SHIPPED` would have made it, on all of CIFAR-10 but 500."""
    (place / "queue.toml").write_text(SHIPPED)
    giver = read_queue(place / "queue.toml").runs["cpu-sparta"]
    named = ("dataset", "arch", "activation", "sites", "width", "seed", "recipe", "validation")
    settings = {k: getattr(giver, k) for k in named} | {"pretrained": None, "images": 49_500, "amp": None}
    activations = {f"G{i + 1}.B2": Sparta(8 * 2**i) for i in range(4)}
    info = {"recipe": in_pixels(settings | giver.numbers())}
    folder = place / "sets/ours"
    SpartaSet(activations, info).save_pretrained(folder)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setitem(hub.SHIPPED, "ours", files)
    monkeypatch.delitem(hub.SHIPPED, "cifar10-resnet18-w16", raising=False)
    for module in (sets, hub):
        monkeypatch.setattr(module, "SETS", place / "sets")
    sets._recipe.cache_clear()
    yield activations
    sets._recipe.cache_clear()


def test_a_shipped_set_replaces_the_run_it_came_from(place, ours):
    run(place, "short-sparta-from-sparta")
    model, settings = train.load_trained(place / "runs/short-sparta-from-sparta/checkpoint.pt")
    assert settings["pretrained"] == "ours"
    assert model.layer4[1].act2.frozen
    assert model.layer4[1].act2.conv3.equal(ours["G4.B2"].conv3.half().float())
    filed = json.loads((place / "results/short-sparta-from-sparta.json").read_text())
    assert "--pretrained ours" in filed["commands"][0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cpu = 8", "cpu = 9"),
        ("seed = 0", "seed = 1"),
        ("limit = 0", "limit = 9"),
        ("false", "true"),
        ("validation = 500", "validation = 400"),
        ('recipe = "fast"', 'recipe = "single"'),
    ],
)
def test_a_shipped_set_of_another_training_does_not(place, ours, old, new):
    assert old in SHIPPED
    (place / "queue.toml").write_text(SHIPPED.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"neither in .*cpu-sparta.set nor in the package"):
        run(place, "short-sparta-from-sparta")


def test_part_of_a_data_set_is_not_taken_for_the_whole(place, capsys):
    (place / "queue.toml").write_text(SMALL.replace("sample = true\nlimit = 40\n", ""))
    for split in ("train", "test"):
        x = np.zeros((60, 32, 32, 3), np.uint8)
        write_parquet(place / f"data/cifar10/{split}-00000-of-00001.parquet", x, np.arange(60) % 10)
    with pytest.raises(ValueError, match="the train split of cifar10 has 50000 images, found 60"):
        run(place, "short-relu", "--data", place / "data")
    run(place, "--next", "--data", place / "data")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no such folder"):
        run(place, "short-relu", "--data", place / "nowhere")
    with pytest.raises(ValueError, match="wants the whole cifar10: --data FOLDER"):
        run(place, "short-relu")
    assert not (place / "runs").exists()


def test_what_is_not_of_the_whole_data_says_so():
    told = {"smoke": "on the sample", "long": "10,000 training images"}
    parts = {r.name.split("-")[0]: r.limit for r in QUEUE.runs.values() if r.sample or r.limit}
    assert parts == {"smoke": 200, "long": 10_000}
    for budget, words in told.items():
        (table,) = [t for t in QUEUE.tables if budget in t.get("budgets", ())]
        assert words in table["title"]
        assert table["budgets"] == [budget]


def test_every_run_is_in_a_table():
    shown = {
        f"{budget}-{row['run']}"
        for table in QUEUE.tables
        for budget in table.get("budgets", ("short", "paper"))
        for row in table["rows"]
    }
    assert {re.sub(r"-seed\d+$", "", name) for name in QUEUE.runs} <= shown


def test_a_result_holds_what_makes_it_again_and_no_folder_of_this_machine(place):
    (place / "queue.toml").write_text(SMALL.replace("seed = 0", "seed = 3"))
    run(place, "short-relu")
    text = (place / "results/short-relu.json").read_text()
    assert str(place) not in text
    result = json.loads(text)
    assert result["seconds per epoch"] > 0
    assert result["settings"]["numbers"]["eps"] == 16 / 255
    assert result["training images"] == 40
    assert len(result["git commit"]) >= 40 or result["git commit"] == "unknown"
    training, evaluation = (c.split()[2:] for c in result["commands"])
    args = train.parser().parse_args([a.strip("'") for a in training])
    assert (args.activation, args.epochs, args.width, args.sites) == ("relu", 1, 8, "G*.B-1")
    assert (args.seed, evaluation[evaluation.index("--seed") + 1]) == (3, "3")
    assert evaluation[0] == "runs/campaign/short-relu/checkpoint.pt"
    model, _ = train.load_trained(place / "runs/short-relu/checkpoint.pt")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_missing_autoattack_is_told_before_the_training(place, monkeypatch):
    (place / "queue.toml").write_text(SMALL.replace("--restarts 1", "--restarts 1 --autoattack"))
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match="AutoAttack is not installed"):
        run(place, "short-relu")
    assert not list(place.rglob("checkpoint.pt"))


def test_what_is_done_is_not_done_again(place, capsys):
    run(place, "short-relu")
    path = place / "runs/short-relu/checkpoint.pt"
    before = path.read_bytes()
    run(place, "short-relu")
    assert "short-relu is done" in capsys.readouterr().out
    assert path.read_bytes() == before


def result(error, **more):
    entry = {"error": error, "low": error - 0.01, "high": error + 0.02, "images": 500}
    entry["wrong"] = packed(torch.arange(500) < round(500 * error))
    attacks = ("clean", "targeted PGD-10, 16/255", "worst case, 8/255", "worst case, 16/255")
    numbers = {"parameters": 1234, "multiply-adds": 5_600_000, "seconds per epoch": 2.5}
    return {
        "errors": dict.fromkeys(attacks, entry),
        **numbers,
        "last epoch": {},
        "machine": "a GPU",
        "test images": "all",
        **more,
    }


def test_the_tables_are_the_papers_beside_ours(place):
    text = SMALL.replace("short = 1", "short = 1\npaper = 2").replace(
        'columns = ["clean"]', 'columns = ["PGD-30", "clean"]'
    )
    text = text.replace("paper = [15.48]", "paper = [65.81, 15.48]")
    rows = 'short-relu = { activation = "relu" }\nshort-sparta-seed1 = { activation = "sparta", seed = 1 }\n'
    text = text.replace(
        'short-relu = { activation = "relu" }\n', rows + 'paper-sparta = { activation = "sparta" }\n'
    )
    (place / "queue.toml").write_text(text)
    queue = read_queue(place / "queue.toml")
    (place / "results").mkdir()
    for name, error in (("short-sparta", 0.2), ("short-sparta-seed1", 0.3), ("paper-sparta", 0.1)):
        filed = result(error, settings=queue.runs[name].settings())
        (place / f"results/{name}.json").write_text(json.dumps(filed))
    call(place, "tables")
    page = (place / "results.md").read_text()
    assert (
        page.split("## Table 2\n")[1]
        == """
T.

1 epoch (`short`):

|  | PGD-30, paper | PGD-30, ours | clean, paper | clean, ours |
| --- | --- | --- | --- | --- |
| SPARTA | 65.81 | missing | 15.48 | 25.00 (20.00 to 30.00, 2 seeds) |

|  | worst case, 8/255 | worst case, 16/255 | saturated gates | parameters | multiply-adds | seconds per epoch | machine |
| --- | --- | --- | --- | --- | --- | --- | --- |
| SPARTA | 25.00 (20.00 to 30.00, 2 seeds; 500 images) | 25.00 (20.00 to 30.00, 2 seeds; 500 images) |  | 1,234 | 5.6 M | 2.5 / 2.5 | a GPU |

| points, from the lowest seed to the highest | clean | targeted PGD-10, 16/255 | worst case, 8/255 | worst case, 16/255 |
| --- | --- | --- | --- | --- |
| SPARTA, 2 seeds | 10.0 | 10.0 | 10.0 | 10.0 |

2 epochs (`paper`):

|  | PGD-30, paper | PGD-30, ours | clean, paper | clean, ours |
| --- | --- | --- | --- | --- |
| SPARTA | 65.81 | missing | 15.48 | 10.00 (9.0-12.0) |

|  | worst case, 8/255 | worst case, 16/255 | saturated gates | parameters | multiply-adds | seconds per epoch | machine |
| --- | --- | --- | --- | --- | --- | --- | --- |
| SPARTA | 10.00 (9.0-12.0; 500 images) | 10.00 (9.0-12.0; 500 images) |  | 1,234 | 5.6 M | 2.5 | a GPU |
"""  # noqa: E501
    )
    call(place, "tables", "--check")
    (place / "results.md").write_text(page.replace("10.00", "9.00"))
    with pytest.raises(SystemExit, match="is not what is filed"):
        call(place, "tables", "--check")


def file_errors(place, errors):
    """File results of the queue's short runs with these errors."""
    queue = read_queue(place / "queue.toml")
    (place / "results").mkdir(exist_ok=True)
    for name, error in errors.items():
        filed = result(error, settings=queue.runs[f"short-{name}"].settings())
        (place / f"results/short-{name}.json").write_text(json.dumps(filed))


def test_differences_are_of_the_same_images():
    a, b = result(0.4), result(0.2)
    half = 1.959964 * (0.2 * 0.8 / 500) ** 0.5  # of 500 images 100 are right here and wrong there
    assert minus(b, a, "clean") == pytest.approx((-0.2, half))
    with pytest.raises(ValueError, match="500 images against 400"):
        minus(a, {"errors": {"clean": b["errors"]["clean"] | {"images": 400}}, "test images": "all"}, "clean")
    with pytest.raises(ValueError, match="of another test split"):
        minus(a, b | {"test images": "others"}, "clean")


def test_saturation_adds_both_ends_of_each_site():
    last = {"epoch": 4.0, "a gain": 1.5, "a < 0.01": 0.25, "a > 0.99": 0.5, "a mean": 0.4}
    last |= {"b < 0.01": 0.0, "b > 0.99": 0.125, "b std": 0.1, "b spatial": 0.9}
    assert saturated({"last epoch": last}) == {"a": 0.75, "b": 0.125}
    assert saturated({"last epoch": {"epoch": 4.0, "loss": 1.0}}) == {}


def test_the_gate_is_held_against_relu_and_half_of_it_in_both_seeds(tmp_path):
    field = ("clean", "untargeted PGD-50, 8/255", "targeted DLR PGD-50, 8/255", "worst case, 8/255")
    for name, error in (("relu", 0.5), ("relu-half", 0.46), ("sparta", 0.4), ("silu", 0.44)):
        for seed in ("", "-seed1"):
            run = QUEUE.runs[f"w16-{name}{seed}"]
            filed = result(error, settings=run.settings())
            filed["errors"] = dict.fromkeys(field, filed["errors"]["clean"])
            (tmp_path / f"{run.name}.json").write_text(json.dumps(filed))
    page = render(QUEUE, tmp_path).split("## Gate, slim\n")[1].split("\n## ")[0]
    assert "| SPARTA w/o DPNet | missing | missing | missing | missing |" in page
    tables = re.findall(r"\| points, minus (.*?) \| (.*) \|\n\| ---.*\n((?:\|.*\n)+)", page)
    assert [(base, attacks.split(" | ")) for base, attacks, _ in tables] == [
        ("ReLU", list(field)),
        ("ReLU times one half", list(field)),
    ]
    found = [
        {(c := line.split(" | "))[0]: c[1].split()[0] for line in rows.splitlines()} for *_, rows in tables
    ]
    for base, error in zip(found, (0.5, 0.46), strict=True):
        for label, other in (("SPARTA", 0.4), ("SiLU everywhere", 0.44)):
            for seed in (0, 1):
                assert base[f"| {label}, seed {seed}"] == f"{100 * (other - error):+.1f}"


def test_rows_are_held_against_the_last_base_above_them(place):
    base = '{ label = "MNIST-M, ReLU", run = "sparta", base = true }, { label = "more", run = "other" }'
    text = SMALL.replace('run = "sparta", paper = [15.48] }', f'run = "sparta" }}, {base}', 1).replace(
        '{ label = "SPARTA", run = "sparta" }',
        '{ label = "ReLU", run = "relu" }, { label = "SPARTA", run = "sparta-from-sparta" }',
    )
    text = text.replace("[[tables]]", 'short-other = { activation = "relu" }\n[[tables]]')
    (place / "queue.toml").write_text(text)
    queue = read_queue(place / "queue.toml")
    (place / "results").mkdir()
    errors = {
        "relu": (0.2, "one"),
        "sparta-from-sparta": (0.3, "one"),
        "sparta": (0.5, "two"),
        "other": (0.5, "two"),
    }
    for name, (error, images) in errors.items():
        settings = queue.runs[f"short-{name}"].settings()
        filed = result(error, settings=settings, **{"test images": images})
        (place / f"results/short-{name}.json").write_text(json.dumps(filed))
    call(place, "tables")
    page = (place / "results.md").read_text()
    heads = [line.split(" | ")[0] for line in page.splitlines() if "points, minus" in line]
    assert heads == ["| points, minus ReLU", "| points, minus MNIST-M, ReLU"]
    assert "| SPARTA, seed 0 | +10.0 ± 2.6 | " in page
    assert "| more, seed 0 | +0.0 ± 0.0" in page


def rivals(place, finding, errors):
    """A queue with ReLU and SPARTA in two seeds and one rival, these errors of theirs, and a conclusion."""
    entries = """short-elu = { activation = "elu" }
short-relu-seed1 = { activation = "relu", seed = 1 }
short-sparta-seed1 = { activation = "sparta", seed = 1 }
"""
    rows = "".join(f'{{ label = "{n}", run = "{n.lower()}" }}, ' for n in ("ReLU", "SPARTA", "ELU"))
    text = SMALL.replace("[[tables]]", entries + "[[tables]]").split("rows = ")[0]
    text += f'against = "SPARTA"\nfigure = ["clean", "worst case, 8/255"]\nrows = [ {rows} ]\n'
    text += f'findings = {{ short = "{finding}" }}\n' if finding else ""
    (place / "queue.toml").write_text(text)
    file_errors(place, errors)


ERRORS = {"relu": 0.4, "relu-seed1": 0.42, "sparta": 0.3, "sparta-seed1": 0.25, "elu": 0.36}


def test_the_page_tells_what_rivals_and_seeds_differ_by(place):
    rivals(place, "", ERRORS)
    call(place, "tables")
    page = (place / "results.md").read_text()
    parts = re.findall(r"\| points, .*\n\| ---.*\n((?:\|.*\n)+)", page)
    cells = [[line.split(" | ")[:2] for line in part.splitlines()] for part in parts]
    assert cells == [
        [
            ["| SPARTA, seed 0", "-10.0 ± 2.6"],
            ["| SPARTA, seed 1", "-17.0 ± 3.3"],
            ["| ELU, seed 0", "-4.0 ± 1.7"],
        ],
        [
            ["| ReLU, seed 0", "+10.0 ± 2.6"],
            ["| ReLU, seed 1", "+17.0 ± 3.3"],
            ["| ELU, seed 0", "+6.0 ± 2.1"],
        ],
        [["| ReLU, 2 seeds", "2.0"], ["| SPARTA, 2 seeds", "5.0"]],
    ]


def test_the_picture_is_of_what_is_filed(place):
    rivals(place, "", ERRORS)
    call(place, "tables")
    assert "(results/2-short.png)\n" in (place / "results.md").read_text()
    first = plt.imread(place / "results/2-short.png")
    assert first.std() > 0.05  # not blank
    rivals(place, "", {"elu": 0.2})
    call(place, "tables")
    assert not np.array_equal(first, plt.imread(place / "results/2-short.png"))
    (place / "queue.toml").write_text((place / "queue.toml").read_text().replace("worst case", "best case"))
    with pytest.raises(ValueError, match="table 2 draws 'best case, 8/255', which none of its results has"):
        call(place, "tables")


def test_a_conclusion_stands_below_its_table_if_all_that_it_quotes_is_there(place, capsys):
    finding = "SPARTA gains, -10.0 ± 2.6 points; ELU loses +6.0 ± 2.1."
    rivals(place, finding, ERRORS)
    call(place, "tables")
    assert (place / "results.md").read_text().endswith(f"\n\n{finding}\n")
    assert "left out" not in capsys.readouterr().out
    rivals(place, finding, {"elu": 0.3})  # another result: one of the two differences is no longer so
    call(place, "tables")
    assert "SPARTA gains" not in (place / "results.md").read_text()
    told = "left out: what campaign.toml concludes from table 2, short, for the results are others"
    assert told in capsys.readouterr().out
    for path in (place / "results").iterdir():
        path.unlink()
    call(place, "tables")
    assert "SPARTA gains" not in (place / "results.md").read_text()
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("table", QUEUE.tables, ids=lambda table: table["number"])
def test_a_base_and_what_is_held_against_it_are_of_one_network_and_data_set(table):
    for budget in table.get("budgets", ("short", "paper")):
        against = None
        for row in table["rows"]:
            run = QUEUE.runs.get(f"{budget}-{row['run']}")
            if row is table["rows"][0] or row.get("base"):
                against = run
            if run and against:
                assert (run.dataset, run.width) == (against.dataset, against.width), row
                assert run.arch.removesuffix("-wide") == against.arch, row


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r["errors"]["clean"].update(error=0.395), "its images tell another one"),
        (lambda r: r["errors"]["clean"].update(wrong=5), "where errors were wanted"),
        (lambda r: r["errors"]["clean"].update(low=0.5), r"0\.4 in \[0\.5, "),
        (lambda r: r.update({"errors": []}), "where errors were wanted"),
        (lambda r: r.update({"multiply-adds": "12"}), r"no number: \['12'\]"),
        (lambda r: r.update({"parameters": float("inf")}), r"no number: \[inf\]"),
        (lambda r: r.update({"last epoch": {"layer1.1.act2 < 0.01": "x"}}), r"no number: \['x'\]"),
        (lambda r: r.pop("test images"), "test images"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(place, change, told):
    file_errors(place, {"sparta": 0.4})
    path = place / "results/short-sparta.json"
    filed = json.loads(path.read_text())
    change(filed)
    path.write_text(json.dumps(filed))
    for action in ((), ("tables",)):
        with pytest.raises(ValueError, match=rf"short-sparta\.json is no result of campaign\.py.*{told}"):
            call(place, *action)


@pytest.mark.slow
def test_the_smoke_run_goes_all_the_way(tmp_path):
    folders = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    for action in (["run", "smoke-sparta", "--device", "cpu"], ["tables"], []):
        python = [sys.executable, "-m", "examples.paper.results.campaign", *folders, *action]
        done = subprocess.run([str(a) for a in python], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "smoke-sparta" in line)
    assert "done" in row
    assert "smoke: smoke 1 of 1" in done.stdout
    error = json.loads((tmp_path / "results/smoke-sparta.json").read_text())["errors"]["clean"]
    cell = f"{100 * error['error']:.2f} ({100 * error['low']:.1f}-{100 * error['high']:.1f})"
    assert cell in (tmp_path / "results.md").read_text().split("## Smoke")[1]


def test_a_run_locked_by_another_process_is_running(place, capsys):
    folder = place / "runs/short-relu"
    folder.mkdir(parents=True)
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):"
    hold += " print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        call(place)
        assert "running" in capsys.readouterr().out
        with pytest.raises((ValueError, SystemExit), match="another process"):
            run(place, "short-relu")
        other.stdin.close()
    call(place)
    assert "running" not in capsys.readouterr().out


def test_the_status_shows_how_far_an_epoch_is(place, capsys):
    folder = place / "runs/short-relu"
    folder.mkdir(parents=True)
    ends = datetime.datetime(2026, 11, 28, 17, 5)
    progress = {"epoch": 1, "images": 12_345, "images per second": 67.8, "ends": ends.timestamp()}
    shown = ", 12,345 images, 68 a second, ends Sat 17:05"
    with lock(folder):
        for text, told in (
            (json.dumps(progress), shown),
            (json.dumps(progress | {"epoch": 2}), ""),  # of an epoch that the log has already
            ("{half", ""),
        ):
            (folder / "progress.json").write_text(text)
            call(place)
            (line,) = re.findall("^ *short-relu .*", capsys.readouterr().out, re.M)
            assert line.rstrip().endswith(f"running epoch 1 of 1{told}")


def test_a_run_by_the_field_protocol_is_filed(place):
    field = "--limit 10 --untargeted-steps 2 --protocol field"
    text = re.sub('quick = ".*"', f'quick = "{field}"', SMALL)
    (place / "queue.toml").write_text(text)
    run(place, "short-relu")
    filed = json.loads((place / "results/short-relu.json").read_text())
    assert {name: e["images"] for name, e in filed["errors"].items()} == {
        "clean": 500,
        "untargeted PGD-2, 8/255": 10,
        "targeted DLR PGD-2, 8/255": 10,
        "worst case, 8/255": 10,
    }
    assert field in filed["commands"][1]
    call(place, "tables")


def test_the_next_run_is_one_that_nobody_has_begun(place, monkeypatch):
    monkeypatch.setattr(campaign, "state", lambda *_: State("missing"))  # as both saw it a moment ago
    (place / "runs/short-relu").mkdir(parents=True)
    with lock(place / "runs/short-relu"):
        run(place, "--next", "--data", "hub")
    assert [p.stem for p in (place / "results").iterdir()] == ["short-sparta"]


def test_what_fails_does_not_keep_the_rest_from_being_done(place, capsys):
    (place / "runs/short-relu").mkdir(parents=True)
    (place / "runs/short-relu/checkpoint.pt").write_bytes(b"no checkpoint")
    for last in ([], ["--budget", "0.01s"]):  # done, or the time is over
        with pytest.raises(SystemExit, match="not done: short-relu"):
            run(place, "--next", *last, "--data", "hub")
    with pytest.raises(SystemExit, match="not done: short-relu"):
        run(place, "--next", "--budget", "9m", "--data", "hub")
    assert "error: short-relu: " in capsys.readouterr().out
    assert {p.stem for p in (place / "results").iterdir()} == {"short-sparta", "short-sparta-from-sparta"}


def test_a_set_that_is_half_there_is_not_taken(place):
    run(place, "short-sparta")
    (place / "runs/short-sparta/set/config.json").unlink()
    with pytest.raises(ValueError, match="waiting for short-sparta"):
        run(place, "short-sparta-from-sparta")


def test_bad_input_is_one_error_that_names_what_is_wrong(place):
    with pytest.raises((ValueError, SystemExit), match="short-relu"):
        run(place, "short-rel")
    with pytest.raises(SystemExit):
        run(place, "--next", "--budget", "soon")
    (place / "results").mkdir()
    (place / "results/short-relu.json").write_text("{half")
    with pytest.raises((ValueError, SystemExit), match=r"short-relu\.json"):
        call(place)
    (place / "queue.toml").write_text(SMALL.replace('"relu"', '"rellu"').replace("width = 8", 'width = "8"'))
    with pytest.raises(
        ValueError, match="short-relu: unknown activation 'rellu', width '8'; short-sparta: unknown"
    ):
        call(place)
    (place / "queue.toml").write_text("epochs = [")
    with pytest.raises((ValueError, SystemExit), match=r"queue\.toml"):
        call(place)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("limit = 40", "limit = 40\nvalidation = 0", "short-sparta: unknown validation 0"),
        ("limit = 40", "limit = 40\nvalidation = true", "unknown validation True"),
        ('title = "T"\n', "", "table 2: it lacks title"),
        (
            " ]\n",
            ' ]\nfigures = ["clean"]\nagainst = 3\n',
            "table 2: figures, against: unknown, or of another",
        ),
        (
            " ]\n",
            " ]\nfigure = [3]\nfindings = { short = 4 }\n",
            r"table 2: text was wanted .* found \[3, 4\]",
        ),
        (" ]\n", ' ]\nfindings = { short = "x" }\n', "its finding for short quotes no difference such as"),
        (" ]\n", " ]\nfigure = []\n", "table 2: its figure names no column"),
        (" ]\n", ' ]\nagainst = "ELU"\n', "table 2: `against` is 'ELU', the label of none of its rows"),
        (', run = "sparta"', "", r"table 2: \{.*SPARTA.*\} of its rows lacks run"),
        ("paper = [15.48]", "paper = [1, 2]", "table 2: `paper` of a row has not as many numbers"),
        (" ]\n", ' ]\nneighbours = [{ label = "L", source = "S" }]\n', "of its neighbours lacks accuracy"),
        (" ]\n", ' ]\ncompared = "x"\nneighbours = []\n', "`compared` is 'x', none of its columns"),
        ("paper = [15.48]", "best = true", r"row SPARTA wants the best epoch, and \['short-sparta'\] has no"),
    ],
)
def test_a_queue_that_makes_no_sense_is_told_before_anything_runs(place, old, new, told):
    assert old in SMALL
    (place / "queue.toml").write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=told):
        call(place, "tables")
    assert not (place / "results.md").exists()


def test_what_is_trained_and_not_evaluated_says_so(place, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluations", lambda arguments: (s for s in [1000]))
    run(place, "short-relu", "--budget", "9m")
    capsys.readouterr()
    call(place)
    assert "trained, not evaluated" in capsys.readouterr().out


def test_a_run_out_of_time_goes_on(place):
    (place / "queue.toml").write_text(SMALL.replace("short = 1", "short = 3"))
    run(place, "short-relu", "--budget", "0.001s")
    assert not list(place.rglob("short-relu.json"))
    run(place, "short-relu")
    assert train.read_checkpoint(place / "runs/short-relu/checkpoint.pt")["epoch"] == 3


def test_an_evaluation_stops_before_a_part_that_would_end_too_late(place, capsys, monkeypatch):
    parts = []

    def evaluations(arguments):
        for seconds in (0, 0, 1000):
            yield seconds
            parts.append(seconds)

    monkeypatch.setattr(evaluate, "evaluations", evaluations)
    run(place, "short-relu", "--budget", "10m")
    assert parts == [0, 0]
    printed = capsys.readouterr().out
    assert "short-relu: trained; its evaluation is not done, the time is over" in printed
    assert "go on with the same command" in printed
    assert not list(place.rglob("short-relu.json"))
    monkeypatch.undo()
    run(place, "short-relu")
    assert (place / "results/short-relu.json").exists()


VALIDATED = SMALL.replace("short = 1", "short = 3").replace("limit = 40", "limit = 40\nvalidation = 10")


@pytest.mark.parametrize(("errors", "best"), [([0.5, 0.3, 0.4], 2), ([0.5, 0.4, 0.3], 3)])
def test_the_best_epoch_is_filed_beside_the_last(place, monkeypatch, errors, best):
    found = iter(errors)
    monkeypatch.setattr(train, "validation_error", lambda *_: next(found))
    text = VALIDATED.replace("paper = [15.48]", "best = true") + 'compared = "clean"\n'
    text += 'neighbours = [ { label = "Others", accuracy = 43.21, source = "their page" } ]\n'
    (place / "queue.toml").write_text(text)
    run(place, "short-sparta")
    folder, filed = place / "runs/short-sparta", json.loads((place / "results/short-sparta.json").read_text())
    assert filed["training images"] == 30
    assert "--validation 10" in filed["commands"][0]
    assert (filed["best epoch"]["epoch"], filed["last epoch"]["epoch"]) == (best, 3)
    assert filed["best epoch"]["validation error"] == min(errors)
    other, (last, chosen) = best < 3, (export.measured(folder / f) for f in (".", "best"))
    assert other == ("runs/campaign/short-sparta/best/checkpoint.pt" in filed["commands"][1])
    assert other == (folder / "best/evaluation.npz").exists()
    assert filed["best errors"] == chosen["errors"]
    assert filed["errors"] == last["errors"]
    error = {"low": 0.6, "high": 0.8, "images": 10, "error": 0.7, "wrong": packed(torch.arange(10) < 7)}
    filed["best errors"]["clean"] = error
    (place / "results/short-sparta.json").write_text(json.dumps(filed))
    call(place, "tables")
    page = (place / "results.md").read_text()
    assert "| SPARTA | 70.00 (60.0-80.0) |\n" in page
    assert f"; 10 images) | {best} | " in page
    assert "| Others | 43.21 | their page |\n| SPARTA | 30.00 (20.0-40.0; 10 images) | this table |\n" in page
    if other:  # another run's best epoch is not filed as this one's
        (place / "results/short-sparta.json").unlink()
        state = torch.load(folder / "best/checkpoint.pt", weights_only=True)
        torch.save(state | {"settings": state["settings"] | {"seed": 7}}, folder / "best/checkpoint.pt")
        with pytest.raises(ValueError, match=r"best.checkpoint\.pt, .* is of another run"):
            run(place, "short-sparta")
    filed["best errors"]["clean"] = error | {"error": 0.6}
    (place / "results/short-sparta.json").write_text(json.dumps(filed))
    with pytest.raises(ValueError, match=r"short-sparta\.json is no result"):
        call(place, "tables")


def test_a_best_epoch_that_no_table_shows_is_not_evaluated(place, monkeypatch):
    found = iter([0.4, 0.5, 0.6])
    monkeypatch.setattr(train, "validation_error", lambda *_: next(found))
    (place / "queue.toml").write_text(VALIDATED)
    run(place, "short-sparta")
    filed = json.loads((place / "results/short-sparta.json").read_text())
    assert (place / "runs/short-sparta/best/checkpoint.pt").exists()
    assert not (place / "runs/short-sparta/best/evaluation.npz").exists()
    assert "best" not in filed["commands"][1]
    assert not filed.keys() & {"best errors", "best epoch"}
    row = '"sparta", best = true, paper'
    (place / "queue.toml").write_text(VALIDATED.replace('"sparta", paper', row))  # a table asks for it later
    call(place, "tables")
    assert "| SPARTA | 15.48 | missing |" in (place / "results.md").read_text()
    run(place, "short-sparta")
    assert (place / "runs/short-sparta/best/evaluation.npz").exists()
    assert "best errors" in json.loads((place / "results/short-sparta.json").read_text())


def test_the_committed_page_is_what_tables_renders():
    page = ROOT / "docs/results.md"
    assert page.exists()
    campaign.main(["tables", "--check"])
    assert any(table.get("findings") for table in QUEUE.tables)
    assert not left_out(QUEUE, page.read_text())
