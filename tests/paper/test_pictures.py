"""The pictures of the documentation show what the code does and what was measured."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from examples.paper.common.gates import activations_of, gate_inputs
from examples.paper.common.models import build
from examples.paper.pictures import command, contest, cost, gate, loss, method
from examples.paper.results.queue import read_queue
from sparta_act import Sparta
from tests.helpers.queues import result

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "pictures"


def test_the_diagram_has_every_convolution_with_its_channels():
    texts = [t.get_text() for t in method.diagram().axes[0].texts]
    drawn = dict(re.findall(r"(conv\d)\n(\w+ to \w+)", "\n".join(texts)))
    sizes = {24: "C", 5: "h", 1: "1"}
    known = {
        name: f"{sizes[p.shape[1]]} to {sizes[p.shape[0]]}"
        for name, p in Sparta(24, hidden=5).named_parameters()
        if name != "gain"
    }
    assert drawn == {**known, "conv5": "1 to 1"}  # which conv6 predicts
    assert any("h = C / 8, at least 8, at most 32" in t for t in texts)
    assert [Sparta(c).hidden for c in (16, 128, 2048)] == [8, 16, 32]


def test_the_gate_that_is_drawn_is_that_of_a_typical_channel(tmp_path):
    torch.manual_seed(0)
    model, x = build("resnet18", "sparta", "G*.B-1", width=8).eval(), torch.rand(3, 3, 32, 32)
    sparta, (site,) = activations_of(model)["G2.B2"], gate_inputs(model, x)["layer2.1.act2"]
    with torch.no_grad():
        drawn, full, c = gate.typical_gate(sparta, site), sparta.attention(site), sparta.scores(site)[1]
        for i in range(3):
            channel = min(range(16), key=lambda j: abs(c[i, j].item() - 1))  # the gain is 1 at the start
            assert torch.equal(drawn[i], full[i, channel])
        assert torch.equal(gate.active_gates(sparta, site), full[site > 0])
    gate.draw(tmp_path / "gate.png", model, x, 2)
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_the_losses_are_compared_image_by_image(tmp_path):
    one, two = torch.tensor([[1.0, 5.0], [0.0, 4.0]]), torch.tensor([[2.0, 6.0], [1.0, 7.0]])
    record = {**loss.numbers({"ReLU": one, "SPARTA": two}), "images": 2}
    assert record["loss per step"]["SPARTA"] == {"mean": [4.0, 4.0], "std": [2.0, 3.0]}
    half = 1.959964 / 2**0.5
    assert record["minus the first"] == {"SPARTA": {"mean": [1.0, 2.0], "half": pytest.approx([0.0, half])}}
    assert "to 2.00 with ReLU, to 4.00 with SPARTA" in loss.title(record)
    assert "SPARTA minus ReLU: +2.00 ± 1.39" in loss.title(record)
    loss.draw(tmp_path / "two.png", record)
    loss.draw(tmp_path / "one.png", {**loss.numbers({"ReLU": one}), "images": 2})
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("one", "two"))


@pytest.mark.parametrize(("error", "won"), [(0.478, True), (0.48, False)])
def test_a_win_is_more_than_two_points_in_both_seeds(tmp_path, error, won):
    queue = read_queue()
    with pytest.raises(ValueError, match="no results of the table 'gate, slim'"):
        contest.draw(tmp_path / "contest.png", queue, tmp_path)
    errors = {"relu": 0.5, "relu-half": 0.5, "relu-seed1": 0.5, "relu-half-seed1": 0.5}
    for name, e in (errors | {"sparta": 0.4, "sparta-seed1": error}).items():
        filed = result(e, settings=queue.runs[f"w16-{name}"].settings())
        (tmp_path / f"w16-{name}.json").write_text(json.dumps(filed))
    pairs = contest.comparisons(queue, tmp_path)
    assert contest.wins(pairs) == ["SPARTA\nminus ReLU", "SPARTA\nminus ReLU times one half"] * won
    contest.draw(tmp_path / "contest.png", queue, tmp_path)
    assert (tmp_path / "contest.png").read_bytes().startswith(b"\x89PNG")


def test_the_contest_shows_the_table_of_the_readme():
    pairs = contest.comparisons(read_queue(), DOCS / "results")
    rows = re.findall(
        r"^\| (.*) \| (.*) \| (\d) \| (.*) \| (.*) \|$", (DOCS.parent / "README.md").read_text(), re.M
    )
    assert len(rows) == 8
    assert {(f"{label}\nminus {base}", int(seed)) for label, base, seed, *_ in rows} <= pairs.keys()


def test_the_cost_is_that_of_the_records(tmp_path):
    found, page = cost.read(DOCS / "speed"), (DOCS / "speed.md").read_text()
    assert list(found) == ["ResNet-18, 32 x 32", "ResNet-18, 224 x 224", "ResNet-50, 224 x 224"]
    for ratios in found.values():
        for row in ratios.keys() & cost.TIMES.keys():
            value, low, high = ratios[row]
            assert f"{value:.2f} ({low:.2f}-{high:.2f})" in page
    small = found["ResNet-18, 32 x 32"]
    models = [build("resnet18", activation, "G*.B-1", width=64) for activation in ("sparta", "relu")]
    sparta, relu = (sum(p.numel() for p in m.parameters()) for m in models)
    assert small["parameters"].value == sparta / relu
    assert small["memory kept\nfor backward"].value == pytest.approx(1.13, abs=0.005)  # plainly 1.33
    assert "1.06 to 1.13" in cost.title(found)
    with pytest.raises(ValueError, match=r"has no record; python -m benchmarks\.network --record"):
        cost.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"loss per step": {"ReLU": 3}, "minus the first": {}}'])
def test_a_record_of_something_else_is_no_picture(tmp_path, text):
    (tmp_path / "loss.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/loss.json is not what `figures` wrote"):
        command.main(["loss", "--out", str(tmp_path)])


def test_the_command_draws_what_is_named(tmp_path, capsys):
    command.main(["method", "cost", "--out", str(tmp_path / "new")])
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"method.png", "cost.png"}
    with pytest.raises(SystemExit):
        command.main(["methods"])
    assert "no picture methods; there are method, gate, loss, contest, cost" in capsys.readouterr().err


def test_the_committed_pictures_are_sharp_small_and_described():
    page = (PICTURES / "README.md").read_text()
    for path in PICTURES.glob("*.png"):
        head = path.read_bytes()[:24]
        width, _ = struct.unpack(">II", head[16:])
        assert (width, path.stat().st_size < 300_000) == (1600, True), path
        assert f"({path.name})" in page
    assert {p.stem for p in PICTURES.glob("*.png")} >= command.PICTURES.keys()
