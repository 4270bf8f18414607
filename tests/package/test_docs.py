"""What the documentation shows is what happens."""

import doctest
import json
import re
from pathlib import Path

import pytest

from examples.paper.audit.page import filled, markdown
from examples.paper.common import records
from examples.paper.common.gates import activations_of
from examples.paper.common.statistics import format_difference, minus
from examples.paper.evaluation import networks
from examples.paper.results.controls import file_of, read
from examples.paper.results.export import NOT_AUDITED
from examples.paper.results.state import read_result
from sparta_act import Sparta

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AUDITS = sorted((DOCS / "audits").glob("*/audit.json"))


def audited(record):
    """The network of an audit, where it lies here: those of width 16 do, larger ones are too large."""
    path = ROOT / record["network"]
    assert path.exists() or "-w16" not in path.name
    return path if path.exists() else None


@pytest.mark.slow
def test_the_surgery_page():
    pytest.importorskip("torchvision")
    failed, tried = doctest.testfile(str(DOCS / "surgery.md"), module_relative=False)
    assert (failed, tried > 15) == (0, True)


def test_differences_in_the_readme_are_those_of_the_filed_results():
    lines = (ROOT / "README.md").read_text().splitlines()
    filed = re.compile(r"\(docs/results/([\w-]+)\.json\)")
    rows = [line for line in lines if len(filed.findall(line)) == 2 and line.startswith("|")]
    assert len(rows) > 3
    for line in rows:
        run, twin = (read_result(name, DOCS / "results") for name in filed.findall(line))
        head = next(h for h in reversed(lines[: lines.index(line)]) if "---" not in h and "](docs" not in h)
        for attack, cell in list(zip(head.split(" | "), line.rstrip(" |").split(" | "), strict=True))[2:]:
            assert cell == format_difference(*minus(run, twin, attack.rstrip(" |"))), (line, attack)


@pytest.mark.parametrize(
    ("experiment", "heading", "rows", "files"),
    [
        ("mean-gate", "| gate | clean |", 4, [("", 0), ("seed1", 0)]),
        ("transfer", "### A frozen set in a new network", 5, [("", 0), ("", 1), ("", 2)]),
        ("drop-in", "### In a network that is trained already", 4, [("", 0)]),
    ],
)
def test_errors_of_the_controls_on_the_page_are_those_of_the_filed_results(experiment, heading, rows, files):
    section = heading + (DOCS / "readings.md").read_text().split(heading)[1].split("\n###")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(table) == rows
    for line in table:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = [read(file_of(DOCS / "results/controls" / at, experiment, label, seed)) for at, seed in files]
        errors = [
            ", ".join(f"{100 * f['errors'][a]['error']:.2f}" for f in found) for a in found[0]["errors"]
        ]
        assert cells[: len(errors)] == errors


@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.parent.name)
def test_the_audit_page_shows_what_was_found(path):
    record = json.loads(path.read_text())
    page = (DOCS / "audit.md").read_text()
    assert markdown(record) in page
    assert filled(page, DOCS / "audits") == page
    for what in ("audit.md", "audit.png"):
        assert f"audits/{path.parent.name}/{what}" in page
    if network := audited(record):
        assert records.sha256(network.read_bytes()) == record["sha256"]


def test_every_card_of_the_package_says_what_an_audit_found_or_that_there_was_none():
    sets = sorted(p.name for p in (ROOT / "sparta_act" / "sets").iterdir() if p.is_dir())
    assert sets
    for name in sets:
        if not (DOCS / "audits" / name).exists():
            assert Sparta.from_pretrained(name).info["audit"] == [NOT_AUDITED]
            assert NOT_AUDITED in (ROOT / "sparta_act" / "sets" / name / "README.md").read_text()
            assert "not been audited yet" in " ".join(
                (DOCS / "audit.md").read_text().replace("**", "").split()
            )
            continue
        record = json.loads((DOCS / "audits" / name / "audit.json").read_text())
        taken = Sparta.from_pretrained(name)
        said, checks = taken.info["audit"][0], taken.info["audit"][3]
        assert said in markdown(record)
        for row, check in zip(checks, record["checks"], strict=True):
            assert (row["figure"], row["verdict"]) == (check["figure"], check["verdict"])
        card = (ROOT / "sparta_act" / "sets" / name / "README.md").read_text()
        assert "## Audit" in card
        assert said in card
        found = activations_of(networks.load(str(path))[0]) if (path := audited(record)) else {}
        for label, activation in found.items():
            for key, value in activation.state_dict().items():
                assert value.equal(taken[label].state_dict()[key]), (label, key)
