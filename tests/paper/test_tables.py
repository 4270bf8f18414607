"""The page of the results, from filed results."""

import json
import re

import pytest
import torch

from examples.paper.common import records
from examples.paper.common.statistics import entry
from examples.paper.results import command
from examples.paper.results.queue import read_queue
from examples.paper.results.tables import render, saturated
from tests.helpers.queues import SMALL, call, file_errors, page, result

QUEUE = read_queue()


def test_the_tables_are_the_papers_beside_ours(place):
    text = SMALL.replace('columns = ["clean"]', 'columns = ["PGD-30", "clean"]')
    row = '{ label = "ReLU", run = "relu", paper = [68.93, 15.66] }'
    text = text.replace("paper = [15.48] }", f"paper = [65.81, 15.48] }}, {row}")
    text = text.replace("[tables.2]", 'short-sparta-seed1 = { activation = "sparta", seed = 1 }\n[tables.2]')
    more = '[tables.{}]\ntitle = "T"\ncolumns = ["clean"]\nrows = [ { label = "L", run = "relu" } ]\n'
    text += more.replace("{}", "3") + more.replace("{}", "more")
    (place / "queue.toml").write_text(text)
    file_errors(place, {"sparta": 0.2, "sparta-seed1": 0.3})
    text = page(place)
    assert (
        text.split("## Table 2\n")[1]
        == """
T. 1 epoch (`short`).

|  | PGD-30, paper | PGD-30, ours | clean, paper | clean, ours (500 images) |
| --- | --- | --- | --- | --- |
| SPARTA | 65.81% | missing | 15.48% | 25.0% (20.0 to 30.0, 2 seeds) |

Not measured yet: ReLU.

|  | worst case, 8/255 (500 images) | saturated gates | parameters | multiply-adds | seconds per epoch | machine |
| --- | --- | --- | --- | --- | --- | --- |
| SPARTA | 25.0% (20.0 to 30.0, 2 seeds) |  | 1,234 | 5.6 M | 2.5 / 2.5 | a GPU |

Not measured yet: Table 3; more.
"""  # noqa: E501
    )
    (place / "results/short-sparta-seed1.json").unlink()
    assert "| 15.48% | 20.0% (16.7-23.7) |\n" in page(place)
    call(place, "tables", "--check")
    (place / "results.md").write_text(text)
    with pytest.raises(SystemExit, match=r"write it with: python -m examples\.paper tables"):
        call(place, "tables", "--check")


def test_saturation_adds_both_ends_of_each_site():
    last = {"epoch": 4.0, "a gain": 1.5, "a < 0.01": 0.25, "a > 0.99": 0.5, "a mean": 0.4}
    last |= {"b < 0.01": 0.0, "b > 0.99": 0.125, "b std": 0.1, "b spatial": 0.9}
    assert saturated({"last epoch": last}) == {"a": 0.75, "b": 0.125}
    assert saturated({"last epoch": {"epoch": 4.0, "loss": 1.0}}) == {}


def test_the_gate_is_compared_with_relu_and_half_of_it_in_both_seeds(tmp_path):
    field = ("clean", "untargeted PGD-50, 8/255", "targeted DLR PGD-50, 8/255", "worst case, 8/255")
    for name, error in (("relu", 0.5), ("relu-half", 0.46), ("sparta", 0.4), ("silu", 0.44)):
        for seed in ("", "-seed1"):
            run = QUEUE.runs[f"w16-{name}{seed}"]
            filed = result(error, settings=run.settings())
            filed["errors"] = dict.fromkeys(field, filed["errors"]["clean"])
            (tmp_path / f"{run.name}.json").write_text(json.dumps(filed))
    section = render(QUEUE, tmp_path).split("## Gate, slim\n")[1].split("\n## ")[0]
    assert "; SPARTA in every block; SPARTA w/o DPNet.\n" in section
    tables = re.findall(r"\| points, minus (.*?) \| (.*) \|\n\| ---.*\n((?:\|.*\n)+)", section)
    assert [(base, attacks.split(" | ")) for base, attacks, _ in tables] == [
        ("ReLU", list(field)),
        ("ReLU times one half", list(field)),
    ]
    for (_, _, rows), error in zip(tables, (0.5, 0.46), strict=True):
        found = {(c := line.split(" | "))[0]: c[1].strip("*").split()[0] for line in rows.splitlines()}
        for label, other in (("SPARTA", 0.4), ("SiLU everywhere", 0.44)):
            for row in ("seed 0", "seed 1", "mean of 2 seeds"):
                assert found[f"| {label}, {row}"] == f"{100 * (other - error):+.1f}"


def test_a_network_trained_again_is_compared_with_what_it_was(place):
    file_errors(place, {"relu": 0.2, "sparta": 0.3})
    assert "earlier" not in page(place)
    (place / "results/earlier").mkdir()
    old = json.loads((place / "results/short-sparta.json").read_text())
    old["errors"] = {"clean": entry(torch.arange(500) < 170)}
    (place / "results/earlier/short-sparta.json").write_text(json.dumps(old))
    assert page(place).endswith(
        """
| points, minus an earlier training with the same seed | clean |
| --- | --- |
| SPARTA, seed 0 alone | **-4.0 ± 1.8** |

Root of the mean square of these 1: clean 4.0.
"""
    )
    (place / "results/earlier/short-sparta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"earlier/short-sparta\.json is not a result"):
        page(place)


def test_rows_are_compared_with_the_last_base_above_them(place):
    base = '{ label = "MNIST-M, ReLU", run = "sparta", base = true }, { label = "more", run = "other" }'
    text = SMALL.replace('run = "sparta", paper = [15.48] }', f'run = "sparta" }}, {base}', 1).replace(
        '{ label = "SPARTA", run = "sparta" }',
        '{ label = "ReLU", run = "relu" }, { label = "SPARTA", run = "sparta-from-sparta" }',
    )
    text = text.replace("[tables.2]", 'short-other = { activation = "relu" }\n[tables.2]')
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
    text = page(place)
    heads = [line.split(" | ")[0] for line in text.splitlines() if "points, minus" in line]
    assert heads == ["| points, minus ReLU", "| points, minus MNIST-M, ReLU"]
    assert "| SPARTA, seed 0 alone | **+10.0 ± 2.7** | " in text
    assert "| more, seed 0 alone | +0.0 ± 0.6" in text


def rivals(place, errors):
    """A queue with ReLU and SPARTA in two seeds and one rival, and these errors of theirs."""
    entries = """short-elu = { activation = "elu" }
short-relu-seed1 = { activation = "relu", seed = 1 }
short-sparta-seed1 = { activation = "sparta", seed = 1 }
"""
    rows = "".join(f'{{ label = "{n}", run = "{n.lower()}" }}, ' for n in ("ReLU", "SPARTA", "ELU"))
    text = SMALL.replace("[tables.2]", entries + "[tables.2]").split("rows = ")[0]
    text += f'against = "SPARTA"\nrows = [ {rows} ]\n'
    (place / "queue.toml").write_text(text)
    file_errors(place, errors)


ERRORS = {"relu": 0.4, "relu-seed1": 0.42, "sparta": 0.3, "sparta-seed1": 0.25, "elu": 0.386}


def test_the_page_shows_each_seed_and_the_mean_with_seeds(place):
    rivals(place, ERRORS)
    parts = re.findall(r"\| points, .*\n\| ---.*\n((?:\|.*\n)+)", page(place))
    cells = [[line.split(" | ")[:2] for line in part.splitlines()] for part in parts]
    assert cells == [
        [
            ["| SPARTA, seed 0", "**-10.0 ± 2.7**"],
            ["| SPARTA, seed 1", "**-17.0 ± 3.3**"],
            ["| SPARTA, mean of 2 seeds", "-13.5 ± 2.8; with seeds ± 44.6"],
            ["| ELU, seed 0 alone", "**-1.4 ± 1.2**"],
        ],
        [
            ["| ReLU, seed 0", "**+10.0 ± 2.7**"],
            ["| ReLU, seed 1", "**+17.0 ± 3.3**"],
            ["| ReLU, mean of 2 seeds", "+13.5 ± 2.8; with seeds ± 44.6"],
            ["| ELU, seed 0 alone", "**+8.6 ± 2.5**"],
        ],
    ]


def test_bold_is_corrected_for_the_number_of_cells_of_its_table(place):
    """Seven images that only one network gets wrong: p = 2 / 2**7, below a third of 0.05. Six: above it."""
    for error, bold in ((0.386, True), (0.388, False)):
        rivals(place, {"relu": 0.4, "elu": error})
        (cell,) = re.findall(r"^\| ELU, seed 0 alone \| (.*?) \|", page(place), re.M)
        assert cell.startswith("**") == bold, cell
    rivals(place, {"relu": 0.4, "elu": 0.386, "relu-seed1": 0.4, "sparta": 0.4, "sparta-seed1": 0.4})
    (cell,) = re.findall(r"^\| ELU, seed 0 alone \| (.*?) \|", page(place).split("minus SPARTA")[0], re.M)
    assert cell == "-1.4 ± 1.2"  # one of nine cells now: 9 * 2 / 2**7 is above 0.05


def shipped(name, errors):
    """A record of `evaluate`, of 500 images."""
    attacks = ("clean", "untargeted PGD-50, 8/255", "AutoAttack, 8/255")
    wrong = (torch.arange(500) < round(500 * e) for e in errors)
    return records.sealed(
        {
            "network": name,
            "sha256": "0123abcd",
            "command": f"python -m examples.paper evaluate {name}.safetensors --protocol ship",
            "errors": {attack: entry(w) for attack, w in zip(attacks, wrong, strict=True)},
            "seed": 0,
            "machine": "a CPU",
            "torch": "2.0",
            "date": "2026-11-30",
            "test images": "all",
        }
    )


def test_the_page_shows_what_ships_and_how_it_differs_from_its_twin(place):
    (place / "results/networks").mkdir(parents=True)
    files = {"slim": (0.3, 0.6, 0.65), "slim-relu": (0.34, 0.6, 0.66), "alone": (0.5, 0.7, 0.8)}
    for name, errors in files.items():
        (place / f"results/networks/{name}.json").write_text(json.dumps(shipped(name, errors)))
    section = page(place).split("## What ships\n")[1]
    assert (
        """
|  | images | slim | slim-relu | slim minus slim-relu |
| --- | --- | --- | --- | --- |
| clean | 500 | 30.0% (26.1-34.2) | 34.0% (30.0-38.3) | **-4.0 ± 1.8** |
| untargeted PGD-50, 8/255 | 500 | 60.0% (55.6-64.2) | 60.0% (55.6-64.2) | +0.0 ± 0.6 |
| AutoAttack, 8/255 | 500 | 65.0% (60.7-69.1) | 66.0% (61.7-70.0) | -1.0 ± 1.0 |
"""
        in section
    )
    assert "|  | images | alone |\n" in section
    assert section.count("| images |") == 2
    for name in files:
        assert f"`{name}`: a CPU, torch 2.0, 2026-11-30; sha256 of its file 0123abcd.\n" in section
        assert f"evaluate {name}.safetensors --protocol ship\n" in section


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["errors"]["clean"].update(images=8), "bytes for 8"),
        (lambda r: r.update(machine="another"), "has changed since it was written"),
        (lambda r: r.pop(records.SEAL), "has changed since it was written"),
        (lambda r: (r.pop("command"), r.update(records.sealed(r))), "it lacks command"),
        (lambda r: r.pop("errors"), "it lacks errors"),
    ],
)
def test_a_record_of_a_network_that_is_damaged_is_named(place, change, expected):
    (place / "results/networks").mkdir(parents=True)
    record = shipped("slim", (0.3, 0.6, 0.65))
    change(record)
    (place / "results/networks/slim.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"slim\.json is not a record of `evaluate` \(.*{expected}"):
        page(place)


def test_the_committed_page_is_what_tables_renders():
    command.tables(["--check"])
