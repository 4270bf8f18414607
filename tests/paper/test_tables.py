"""The page of the results, from filed results."""

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from examples.paper.common.statistics import minus
from examples.paper.results import command
from examples.paper.results.queue import read_queue
from examples.paper.results.tables import render, saturated
from tests.helpers.queues import SMALL, call, file_errors, page, result

QUEUE = read_queue()


def test_the_tables_are_the_papers_beside_ours(place):
    text = SMALL.replace("short = { epochs = 1 }", "short = { epochs = 1 }\npaper = 2").replace(
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
    text = page(place)
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
    text = SMALL.replace("[tables.2]", entries + "[tables.2]").split("rows = ")[0]
    text += f'against = "SPARTA"\nfigure = ["clean", "worst case, 8/255"]\nrows = [ {rows} ]\n'
    text += f'findings = {{ short = "{finding}" }}\n' if finding else ""
    (place / "queue.toml").write_text(text)
    file_errors(place, errors)


ERRORS = {"relu": 0.4, "relu-seed1": 0.42, "sparta": 0.3, "sparta-seed1": 0.25, "elu": 0.36}


def test_the_page_tells_what_rivals_and_seeds_differ_by(place):
    rivals(place, "", ERRORS)
    text = page(place)
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


def test_the_committed_page_is_what_tables_renders():
    page = ROOT / "docs/results.md"
    assert page.exists()
    command.main(["tables", "--check"])
    assert any(table.get("findings") for table in QUEUE.tables)
    assert not left_out(QUEUE, page.read_text())
