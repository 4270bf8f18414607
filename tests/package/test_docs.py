"""What the documentation shows is what happens."""

import csv
import doctest
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparta_act
from examples.paper.attacks.pgd import pgd
from examples.paper.audit.attacks import CLEAN, PLAIN
from examples.paper.audit.page import markdown
from examples.paper.common import records
from examples.paper.common.gates import activations_of
from examples.paper.common.models import ResNet
from examples.paper.common.statistics import mean_difference, pair_of, paired, rounded
from examples.paper.controls.experiment import file_of, read
from examples.paper.evaluation import networks
from examples.paper.results.differences import marked
from examples.paper.results.export import NOT_AUDITED
from examples.paper.results.state import read_result
from sparta_act import Sparta, SpartaError, replace_relus

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
AUDITS = sorted((DOCS / "audits").glob("*/audit.json"))
RUNS = {"SPARTA": "sparta", "ReLU times one half": "relu-half", "SiLU everywhere": "silu", "ReLU": "relu"}
SLOWER = "ReLU at 0.025"  # in width 64


def table_in(text):
    """The cells of a text's only table, line by line, the head first."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    return [head, *rows]


def audited(record):
    """The network of an audit, where it lies here: those of width 16 do, larger ones are too large."""
    path = ROOT / record["network"]
    assert path.exists() or "-w16" not in path.name
    return path if path.exists() else None


ON_GITHUB = r"https://github\.com/sparta-act/sparta-act/(?:blob|tree)"
RAW = r"https://raw\.githubusercontent\.com/sparta-act/sparta-act"


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if absolute := re.fullmatch(f"(?:{ON_GITHUB}|{RAW})/main/(.*)", link):
            base, link = ROOT, absolute[1]
        elif link.startswith("http"):
            continue
        else:
            base = page.parent
            assert page != ROOT / "README.md", f"{link} would lead nowhere on PyPI"
        path, _, anchor = link.partition("#")
        target = (base / path).resolve() if path else page
        assert target.exists(), link
        target = target / "README.md" if target.is_dir() and anchor else target
        if base != ROOT and page.parent == DOCS:
            assert target.is_relative_to(DOCS), f"{link} leaves the folder that the site is made of"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.slow
@pytest.mark.parametrize(("page", "examples"), [("surgery.md", 15), ("api.md", 10)])
def test_the_sessions_of_a_page(page, examples):
    pytest.importorskip("torchvision")
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False)
    assert (failed, tried > examples) == (0, True)


def test_the_files_to_copy_are_on_their_page():
    included = re.findall(r'^--8<-- "examples/(.+)"$', (DOCS / "example.md").read_text(), re.MULTILINE)
    files = {path.name for path in (ROOT / "examples").glob("[a-z]*.py")}
    assert set(included) == files - {"quickstart.py"}


def test_the_architecture_names_every_file_of_the_package():
    table = (DOCS / "architecture.md").read_text().split("## The package")[1].split("\n## ")[0]
    named = " ".join(line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `"))
    files = {p.relative_to(ROOT / "sparta_act").with_suffix("") for p in (ROOT / "sparta_act").rglob("*.py")}
    assert {*re.findall(r"[\w/]+", named)} == {f.as_posix() for f in files if f.name != "__init__"}


def test_the_api_page_shows_every_public_name():
    page = (DOCS / "api.md").read_text()
    errors = {error.__name__ for error in SpartaError.__subclasses__()}
    assert {*re.findall(r"^::: sparta_act\.(?:errors\.)?(\w+)$", page, re.MULTILINE)} == {
        *sparta_act.__all__,
        *errors,
    }
    session = re.search(r"```pycon\n(.*?)```", page, re.DOTALL)[1]
    used = re.sub(r"(?m)^.* import .*$", "", session)
    assert [name for name in sparta_act.__all__ if not re.search(rf"\b{name}\b", used)] == []


@pytest.mark.slow
def test_the_examples_of_the_docstrings():
    scope = {n: getattr(sparta_act, n) for n in sparta_act.__all__} | {"nn": nn, "torch": torch}
    scope["torchvision"] = pytest.importorskip("torchvision")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in sparta_act.__all__:
        for example in doctest.DocTestFinder().find(scope[name], name, module=False, globs=scope):
            runner.run(example)
    assert runner.tries > 5
    assert runner.failures == 0


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_snippets_of_the_readme():
    """A network for the first, and a step of fine-tuning."""
    torchvision = pytest.importorskip("torchvision")
    first, fine_tuning = snippets("README.md")
    scope = {"my_resnet": torchvision.models.resnet34()}
    exec(first, scope)
    assert [m.frozen for m in scope["my_resnet"].modules() if isinstance(m, Sparta)] == 4 * [True]
    fresh = eval(
        re.search(r"`(replace_relus\(torchvision[^`]*)`", README)[1], {**scope, "torchvision": torchvision}
    )
    assert [m.in_channels for m in fresh.modules() if isinstance(m, Sparta)] == [256, 512, 1024, 2048]

    trained = torchvision.models.resnet18(num_classes=10)
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    before = trained.eval()(x)
    scope |= {
        "F": F,
        "nn": nn,
        "torch": torch,
        "pgd": pgd,
        "my_trained_resnet": trained,
        "loader": [(x, y)],
    }
    scope |= {"Normalize": lambda mean, std: nn.Identity(), "mean": None, "std": None}
    replacing, loop = fine_tuning.split("gains =")
    exec(replacing, scope)
    assert scope["net"].eval()(x).equal(before)
    exec("gains =" + loop, scope)
    assert len(scope["gains"]) == 4
    assert all(gain != 0 for gain in scope["gains"])


@pytest.mark.slow
def test_the_snippets_of_the_page_on_sets(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    net = replace_relus(torchvision.models.resnet18(), "G1.B2")
    scope = {"net": net, "model": torchvision.models.resnet34()}
    for snippet in snippets("docs/pretrained.md"):
        exec(snippet, scope)
    assert sum(isinstance(m, Sparta) for m in scope["model"].modules()) == 4
    assert list(scope["activations"]) == ["G1.B2"]


def test_differences_in_the_readme_are_those_of_the_filed_results():
    """One row for each of four pairs of networks in each seed, in the order of the verdict."""
    head, *rows = table_in(README[README.index("| network | against | seed |") :].split("\n\n")[0])
    assert [tuple(row[:3]) for row in rows] == [
        (*pair, seed)
        for pair in [
            ("SPARTA", "ReLU"),
            ("SPARTA", "ReLU times one half"),
            ("ReLU times one half", "ReLU"),
            ("SiLU everywhere", "ReLU"),
        ]
        for seed in "01"
    ]
    assert head[3:] == ["clean", "worst case, 8/255"]
    pairs = []
    for label, against, seed, *_ in rows:
        names = (f"w16-{RUNS[name]}{'-seed1' * int(seed)}" for name in (label, against))
        both = [read_result(name, DOCS / "results") for name in names]
        pairs += [pair_of(*both, attack) for attack in head[3:]]
    assert [cell for row in rows for cell in row[3:]] == marked(pairs)
    text = " ".join(README.split())
    for what, seeds in (("ReLU", (1, 3)), ("ReLU times one half", (5, 7))):
        assert (
            f"than that of {what} by {mean_difference([pairs[i] for i in seeds]).replace('-', '', 1)}" in text
        )


PAIRS = ["SPARTA, minus ReLU", "ReLU times one half, minus ReLU", "SPARTA, minus ReLU times one half"]


@pytest.mark.parametrize(
    ("heading", "prefix", "others", "pairs"),
    [
        ("### On MNIST-M", "w16-mnistm-", {}, []),
        (
            "### Width 64",
            "w64-",
            {SLOWER: "w64-relu-lr"},
            [f"{a}, minus {b}" for a in (SLOWER, "SiLU everywhere") for b in ("ReLU", "ReLU times one half")],
        ),
    ],
)
def test_differences_in_a_section_are_those_of_the_filed_results(heading, prefix, others, pairs):
    runs = {name: prefix + run for name, run in RUNS.items()} | others
    section = (DOCS / "robustness.md").read_text().split(f"{heading}\n")[1].split("\n### ")[0]
    head, *rows = table_in(section)
    assert [row[0] for row in rows] == PAIRS + pairs
    for label, *cells in rows:
        both = [read_result(runs[name], DOCS / "results") for name in label.split(", minus ")]
        assert cells == [str(paired(pair_of(*both, attack))) for attack in head[1:]]


def test_errors_of_width_64_are_those_of_the_filed_results():
    """What the README and rivals.md say of them."""
    runs = {n: f"w64-{run}" for n, run in RUNS.items()} | {SLOWER: "w64-relu-lr"}
    found = {name: read_result(run, DOCS / "results") for name, run in runs.items()}
    readme, rivals = (" ".join(text.split()) for text in (README, (DOCS / "rivals.md").read_text()))
    for name, result in found.items():
        clean, worst = (result["errors"][a]["error"] for a in ("clean", "worst case, 8/255"))
        assert f"{name} {rounded(clean)}% and {rounded(worst)}%" in readme
        assert f"{rounded(1 - worst)}% ({name})" in rivals


def test_learning_rates_are_those_of_the_filed_losses():
    """The table of robustness.md, and how far behind ReLU is in training."""
    section = (DOCS / "robustness.md").read_text().split("### The learning rate")[1].split("\n### ")[0]
    text = " ".join(section.split())
    with (DOCS / "results/controls/learning-rate.csv").open() as file:
        filed = {
            (row["lr"], row["width"], row["activation"]): float(row["loss"]) for row in csv.DictReader(file)
        }
    _, *rows = table_in(section)
    names = ("relu", "relu-half", "sparta")
    keys = [(width, name) for width in ("64", "16") for name in names]
    shown = {(lr, *key): cell for lr, *cells in rows for key, cell in zip(keys, cells, strict=True)}
    assert shown == {key: f"{loss:.3f}" for key, loss in filed.items()}
    first = {key: filed[("0.1", *key)] for key in keys}
    best = {key: min(loss for (_, *of), loss in filed.items() if tuple(of) == key) for key in keys}
    for width, said in (
        ("64", "{:.2f} behind the constant; with the best rate of each it is {:.2f} behind"),
        ("16", "{:.3f} behind the constant at 0.1 and {:.3f} with the best rate of each"),
    ):
        behind = (of[width, "relu"] - of[width, "relu-half"] for of in (first, best))
        assert said.format(*behind) in text
    last = [read_result(f"w64-{name}", DOCS / "results")["last epoch"] for name in names]
    wrong, held = ([f"{rounded(row[key])}%" for row in last] for key in ("error", "validation error"))
    assert (
        f"{wrong[0]} of the attacked training images are wrong with ReLU, {wrong[1]} with ReLU times" in text
    )
    assert f"{wrong[2]} with SPARTA; of the 500 images held out {held[0]}, {held[1]} and {held[2]} " in text


@pytest.mark.parametrize(
    ("to", "name", "said"),
    [
        ("torchvision", "relu", "with torchvision's and ReLU {}, {} and {}."),
        ("mnist-m", "cifar10-resnet18-w16-relu", "with the whole ReLU network {}, {} and {} are wrong under"),
        ("mnist-m", "relu", "with ReLU {}, {} and {} are wrong,"),
        ("mnist-m", "relu-half", "with the constant {}, {} and {}."),
    ],
)
def test_errors_by_learning_rate_are_those_of_the_filed_results(to, name, said):
    text = " ".join((DOCS / "robustness.md").read_text().split())
    folder, labels = DOCS / "results/controls", [f"{name} at {lr:g}" for lr in (0.01, 0.03, 0.1)]
    found = [read(file_of(folder, f"rate {to}", label, 7))["errors"]["PGD-10, 8/255"] for label in labels]
    assert said.format(*(f"{rounded(entry['error'])}%" for entry in found)) in text


def test_costs_in_the_readme_are_those_of_the_speed_page():
    """The medians of the page's tables, which are of a ResNet-18 and, after it, of a ResNet-50."""
    costs = " ".join(README.split("## What it costs")[1].split("##")[0].split())
    patterns = {
        "training step / ReLU": [
            r"takes ([\d.]+) times as long to train",
            r"ResNet-50 .* takes ([\d.]+) times",
        ],
        "input gradient / ReLU": [r"([\d.]+) times to attack"],
        r"\w+ for backward / ReLU": [r"keeps ([\d.]+) times the memory"],
        "parameters / ReLU": [r"has ([\d.]+) times the parameters"],
    }
    for row, wanted in patterns.items():
        cells = re.findall(rf"^\| {row} .*\| ([\d.]+)[^|]*\|$", (DOCS / "speed.md").read_text(), re.MULTILINE)
        shown = [re.search(pattern, costs)[1] for pattern in wanted]
        assert shown == [f"{float(cell):.2f}" for cell in cells[: len(shown)]], row


@pytest.mark.parametrize(
    ("experiment", "heading", "rows", "files"),
    [
        ("mean-gate", "| gate | clean |", 4, [("", 0), ("w64", 0)]),
        ("drop-in", "## In a network that is trained already", 4, [("", 0)]),
    ],
)
def test_errors_of_the_controls_on_the_page_are_those_of_the_filed_results(experiment, heading, rows, files):
    section = heading + (DOCS / "robustness.md").read_text().split(heading)[1].split("\n## ")[0]
    _, *table = table_in(section)
    assert len(table) == rows
    for label, *cells in table:
        found = [read(file_of(DOCS / "results/controls" / at, experiment, label, seed)) for at, seed in files]
        errors = [
            ", ".join(f"{100 * f['errors'][a]['error']:.2f}" for f in found) for a in found[0]["errors"]
        ]
        assert cells[: len(errors)] == errors


@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.parent.name)
def test_the_audit_page_shows_what_was_found(path):
    record = json.loads(path.read_text())
    page = (DOCS / "audit.md").read_text()
    assert markdown(record) in path.with_name("audit.md").read_text()
    for what in (record["worst case"], record["attacks"][PLAIN], record["attacks"][CLEAN]):
        assert f"{rounded(what['error'])}%" in page
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
        said, checks = taken.info["audit"][0], next(p for p in taken.info["audit"] if isinstance(p, list))
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


def test_the_messages_that_a_page_explains_are_those_of_the_errors():
    quoted = re.findall(r"^\| `([^`]*)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    net = ResNet("resnet18", width=8)
    edited = replace_relus(ResNet("resnet18", width=8), "G*.B-1").state_dict()
    x, y = torch.full((2, 3, 8, 8), 2.0), torch.tensor([0, 1])
    causes = {
        "cannot replace ReLU at": lambda: replace_relus(net, "G9.B1"),
        "Unexpected key(s) in state_dict": lambda: net.load_state_dict(edited),
        "images must lie in [0, 1]": lambda: pgd(net, x, y, eps=8 / 255, step_size=2 / 255, steps=1),
    }
    assert [q.removesuffix(" ...") for q in quoted] == [*causes, "operator torchvision::nms does not exist"]
    for message, cause in causes.items():
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            cause()
