"""Sets made by `export` from real runs on a few images."""

import contextlib
import json
import re
import shlex
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch

from examples.paper.audit import run as audit_run
from examples.paper.audit.budget import Budget
from examples.paper.audit.command import main as audit
from examples.paper.common import records
from examples.paper.common.statistics import paired, rounded
from examples.paper.evaluation.command import main as evaluate
from examples.paper.evaluation.networks import NETWORKS
from examples.paper.results import export
from examples.paper.results.renew import main as renew
from examples.paper.results.state import RESULTS
from examples.paper.training import loop
from examples.paper.training.checkpoint import load_trained
from examples.paper.training.command import main as train
from examples.paper.training.command import parser as train_parser
from examples.paper.training.loop import Settings
from examples.paper.training.recipes import chosen
from sparta_act import Sparta
from sparta_act.pretrained import CARD, WEIGHTS

SETS = export.PACKAGE / "sets/cifar10-resnet18-w16"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """SPARTA and its ReLU twin, trained and evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    for activation in ("relu", "sparta"):
        run = ["--out", folder / activation, "--activation", activation, "--recipe", "fast", "--epochs", 1]
        train([str(a) for a in (*run, "--data", tiny_data, "--width", 8, "--device", "cpu")])
        _evaluate(folder / activation, tiny_data)
    return folder


def _evaluate(run, tiny_data, *more):
    words = [run / "checkpoint.pt", "--data", tiny_data, "--protocol", "quick", "--device", "cpu", *more]
    evaluate([str(a) for a in words])


def _export(*words):
    export.main([str(a) for a in words])


def test_a_set_is_what_was_evaluated_and_its_card_says_how(runs, tmp_path):
    _export(runs / "sparta", "--twin", runs / "relu", "--out", tmp_path / "set")
    taken = Sparta.from_pretrained(tmp_path / "set")
    model, _ = load_trained(runs / "sparta" / "checkpoint.pt")
    for i in range(4):
        stored, trained = taken[f"G{i + 1}.B2"], model.get_submodule(f"layer{i + 1}.1.act2")
        for key, value in trained.state_dict().items():
            assert torch.equal(stored.state_dict()[key], value.half().float())
    errors = [json.loads((runs / r / "evaluation.json").read_text())["errors"] for r in ("sparta", "relu")]
    rows = {row["error"]: row for row in taken.info["measured"]}
    assert list(rows) == list(errors[0])
    for attack, row in rows.items():
        ours, twin = (records.unpacked(e[attack]["wrong"], e[attack]["images"]) for e in errors)
        assert row["SPARTA"].startswith(f"{rounded(ours.float().mean().item())}% (")
        assert row["ReLU twin"].startswith(f"{rounded(twin.float().mean().item())}% (")
        assert row["difference"] == str(paired((ours, twin)))
    card = (tmp_path / "set/README.md").read_text()
    for line in (
        "over images, of one training each",
        "| recipe, eps | 16/255 |",
        "| recipe, step_size | 10/255 |",
    ):
        assert line in card


def test_the_card_of_a_best_epoch_says_which_and_by_what(tmp_path, tiny_data, monkeypatch):
    errors = iter([0.5, 0.6, 0.5, 0.4])
    monkeypatch.setattr(loop, "validation_error", lambda *_: next(errors))
    words = ["--recipe", "fast", "--epochs", 2, "--limit", 40, "--data", tiny_data, "--width", 8]
    for activation in ("sparta", "relu"):
        run = tmp_path / activation
        more = ["--out", run, "--activation", activation, "--validation", 9, "--device", "cpu"]
        train([str(w) for w in (*words, *more)])
        for checkpoint in (run, run / "best"):
            _evaluate(checkpoint, tiny_data, "--limit", 5)
    run, twin, out = tmp_path / "sparta", tmp_path / "relu", tmp_path / "set"
    held = "the lowest error on 9 held-out training images"
    for ours, theirs, epoch in (
        ("best", "best", f"1 of 2, {held}; of the twin 2 of 2, {held}"),
        (".", ".", "2 of 2, the last; of the twin 2 of 2, the last"),
    ):
        _export(run / ours, "--twin", twin / theirs, "--out", out)
        assert f"| epoch | {epoch} |" in (out / "README.md").read_text()
    before = (out / "README.md").read_bytes()
    for ours, theirs in (("best", "."), (".", "best")):
        with pytest.raises(ValueError, match=r"not a matching twin: .* is epoch 2 of 2, .*; .* is . of 2"):
            _export(run / ours, "--twin", twin / theirs, "--out", out)
    assert (out / "README.md").read_bytes() == before


def test_a_set_without_a_twin_has_its_own_column_alone(runs, tmp_path):
    _export(runs / "sparta", "--out", tmp_path / "set")
    assert {tuple(row) for row in Sparta.from_pretrained(tmp_path / "set").info["measured"]} == {
        ("error", "images", "SPARTA")
    }


def test_what_was_not_evaluated_or_otherwise_makes_no_set(runs, tmp_path, tiny_data):
    run, out = tmp_path / "run", tmp_path / "set"
    with pytest.raises(ValueError, match=r"RUN is a folder that `train` or `run` wrote"):
        _export(run, "--out", out)
    shutil.copytree(runs / "sparta", run)
    (run / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"write it with: python -m examples\.paper evaluate"):
        _export(run, "--out", out)
    _evaluate(run, tiny_data, "--limit", 5)
    with pytest.raises(
        ValueError, match="not a matching twin: images of targeted PGD-2, 16/255 is 20, must be 5, images of"
    ):
        _export(run, "--twin", runs / "relu", "--out", out)
    with pytest.raises(ValueError, match="not a matching twin: activation is 'sparta', must be 'relu'"):
        _export(run, "--twin", run, "--out", out)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"epoch": 7}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match="it is of another checkpoint"):
        _export(run, "--out", out)
    with pytest.raises(ValueError, match="its network has no SPARTA, its activation is relu"):
        _export(runs / "relu", "--out", out)
    assert not out.exists()


def swapped(record):
    """As many images are wrong, but others."""
    entry = record["errors"]["clean"]
    wrong = records.unpacked(entry["wrong"], entry["images"])
    entry["wrong"] = records.packed(wrong.flip(0))
    assert not wrong.equal(wrong.flip(0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["errors"]["clean"].pop("wrong"), "not the errors of an evaluation"),
        (lambda r: r["errors"]["clean"].update(images=104), "is not that of the packed images|bytes for 104"),
        (lambda r: r.update(errors={}), "not the errors of an evaluation"),
        (lambda r: r.pop("machine"), "it lacks machine"),
        (lambda r: r.pop("sha256"), "it lacks sha256"),
        (lambda r: r.update(machine="another"), "a number or word in it has changed since it was written"),
        (lambda r: r["errors"]["clean"].update(seconds=99.0), "has changed since it was written"),
        (swapped, "has changed since it was written"),
    ],
)
def test_a_damaged_evaluation_makes_no_set(runs, tmp_path, change, expected):
    run, out = tmp_path / "run", tmp_path / "set"
    shutil.copytree(runs / "sparta", run)
    record = json.loads((run / "evaluation.json").read_text())
    change(record)
    for text in (json.dumps(record), "[]", "{half"):
        (run / "evaluation.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"evaluation\.json cannot be used: .*evaluate .* again"
        ) as raised:
            _export(run, "--out", out)
        assert re.search(expected, str(raised.value)) or text in ("[]", "{half")
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(runs, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a set"):
        _export(runs / "sparta", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", 'q"uote', ".hid", "/abs"])
def test_a_set_of_the_package_has_a_plain_name(runs, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(export, "PACKAGE", tmp_path)
    with pytest.raises(SystemExit):
        _export(runs / "sparta", "--ship", name)
    assert "must be small letters, digits, dots and dashes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shipping_writes_the_hashes_of_that_set_and_leaves_the_others(runs, tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    (tmp_path / "pretrained").mkdir()
    shipped = tmp_path / "pretrained/shipped.json"
    shutil.copy(export.PACKAGE / "pretrained/shipped.json", shipped)
    monkeypatch.setattr(export, "PACKAGE", tmp_path)
    (tmp_path / "sets/a-new-set/.saving-killed").mkdir(parents=True)
    shutil.copy(SETS / "config.json", tmp_path / "sets/a-new-set")  # as a killed call would leave it
    _export(runs / "sparta", "--ship", "a-new-set")
    files = {
        f.name: records.sha256(f.read_bytes())
        for f in (tmp_path / "sets/a-new-set").glob("*.*[a-z]")
        if f.is_file()
    }
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    written = json.loads(shipped.read_text())
    entry = written.pop("a-new-set")
    assert written == json.loads((SETS.parents[1] / "pretrained/shipped.json").read_text())
    assert entry.pop("sha256") == files
    config = json.loads((tmp_path / "sets/a-new-set/config.json").read_text())
    assert entry.pop("channels") == {label: site["in_channels"] for label, site in config["sites"].items()}
    assert entry.pop("dataset") == config["info"]["dataset"]
    rows = {row["error"]: row for row in config["info"]["measured"]}
    errors = {attack: row["SPARTA"] for attack, row in rows.items()}
    assert errors["clean"].startswith(f"{entry.pop('clean')}% (")
    worst = f"worst case, {entry.pop('eps')}"
    assert errors[worst].startswith(f"{entry.pop('worst_case')}% (")
    assert rows[worst]["images"] == str(entry.pop("images"))
    assert entry == dict.fromkeys(("relu_clean", "relu_worst_case", "half_clean", "half_worst_case"))
    assert "\nlicense: apache-2.0\n" in (tmp_path / "sets/a-new-set/README.md").read_text()
    (tmp_path / "sets/a-new-set/config.json").write_text("of another set")
    with pytest.raises(ValueError, match="a set never changes: give another name"):
        _export(runs / "sparta", "--ship", "a-new-set")
    assert (tmp_path / "sets/a-new-set/config.json").read_text() == "of another set"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"recipe": "paper", "eps": "16/255", "epochs": 3, "limit": 2000, "images": 1500},
        {"amp": "bf16", "nesterov": True, "targeted": True, "validation": None, "images": 50_000},
        {"dataset": "svhn", "validation": None, "images": 73_257},
    ],
)
def test_the_command_on_a_card_trains_with_its_recipe(changed):
    recipe = Sparta.from_pretrained(SETS).info["recipe"] | changed
    limit = recipe.pop("limit", None)
    words = shlex.split(export.training_command(recipe))
    assert words[:4] == ["python", "-m", "examples.paper", "train"]
    args = train_parser().parse_args(words[4:])
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    assert settings.limit == limit
    assert export.in_pixels(settings.recorded(chosen(args), recipe["images"])) == recipe


@pytest.mark.slow
def test_a_card_is_renewed_from_what_was_measured_of_its_network_and_the_weights_stay(
    tmp_path, tiny_data, monkeypatch
):
    shutil.copytree(SETS, tmp_path / "sets" / SETS.name)
    (tmp_path / "pretrained").mkdir()
    shipped = shutil.copy(export.PACKAGE / "pretrained/shipped.json", tmp_path / "pretrained/shipped.json")
    monkeypatch.setattr(export, "PACKAGE", tmp_path)
    monkeypatch.setattr(audit_run, "Budget", partial(Budget, 2, 1, 1, 2, 1, 1, 4))
    networks = [str(NETWORKS / f"cifar10-resnet18-w16{end}.safetensors") for end in ("", "-relu")]
    options = ["--data", str(tiny_data), "--device", "cpu"]
    for network in networks:
        out = tmp_path / Path(network).stem
        evaluate([network, *options, "--protocol", "quick", "--out", str(tmp_path)])
        with contextlib.suppress(SystemExit):  # of six images it can say anything
            audit([network, *options, "--limit", "6", "--out", str(out)])
    ours, relu = (tmp_path / Path(network).stem for network in networks)
    words = [SETS.name, "--evaluation", ours / "evaluation.json", "--twin", relu / "evaluation.json"]
    before = {name: (tmp_path / "sets" / SETS.name / name).read_bytes() for name in (CARD, WEIGHTS)}
    for audited, evaluation in ((relu, ours), (ours, relu)):
        with pytest.raises(ValueError, match=r"is not that of the|no SPARTA|another network"):
            renew(
                [
                    str(w)
                    for w in (
                        *words[:2],
                        evaluation / "evaluation.json",
                        *words[3:],
                        "--audit",
                        audited / "audit.json",
                    )
                ]
            )
    assert {name: (tmp_path / "sets" / SETS.name / name).read_bytes() for name in before} == before
    lost = json.loads((ours / "audit.json").read_text())
    lost["checks"][0]["verdict"] = "pass, of course"
    (tmp_path / "changed.json").write_text(json.dumps(lost))
    del lost[records.SEAL]
    (tmp_path / "unsealed.json").write_text(json.dumps(lost))
    foreign = json.loads((relu / "evaluation.json").read_text()) | {"sha256": "0" * 64}
    records.write_record(tmp_path / "foreign.json", records.sealed(foreign))
    for twin, audited, wrong in (
        (ours / "evaluation.json", ours / "audit.json", "is not of its ReLU twin"),
        (tmp_path / "foreign.json", ours / "audit.json", "is not of its ReLU twin"),
        (relu / "evaluation.json", tmp_path / "changed.json", "has changed since it was written"),
        (relu / "evaluation.json", tmp_path / "unsealed.json", "has changed since it was written"),
    ):
        with pytest.raises(ValueError, match=wrong):
            renew([str(w) for w in (*words[:4], twin, "--audit", audited)])
    assert {name: (tmp_path / "sets" / SETS.name / name).read_bytes() for name in before} == before
    half = json.loads((RESULTS / "w16-relu-half.json").read_text())
    half["errors"] = json.loads((relu / "evaluation.json").read_text())["errors"]
    del half["errors"]["untargeted PGD-5, 8/255"]
    half["test images"] = json.loads((relu / "evaluation.json").read_text())["test images"]
    (tmp_path / "half.json").write_text(json.dumps(half))
    for change in (
        {"width": 64},
        {"activation": "relu"},
        {"numbers": half["settings"]["numbers"] | {"lr": 1}},
    ):
        unlike = half | {"settings": half["settings"] | change}
        (tmp_path / "unlike.json").write_text(json.dumps(unlike))
        with pytest.raises(ValueError, match=r"unlike\.json was not trained like the set: "):
            renew([str(w) for w in (*words, "--half", tmp_path / "unlike.json")])
    with pytest.raises(ValueError, match=r"there is no .*nowhere\.json"):
        renew([str(w) for w in (*words, "--half", tmp_path / "nowhere.json")])
    assert {name: (tmp_path / "sets" / SETS.name / name).read_bytes() for name in before} == before
    renew([str(w) for w in (*words, "--half", tmp_path / "half.json")])
    for row in Sparta.from_pretrained(tmp_path / "sets" / SETS.name).info["measured"]:
        lacks = row["error"] not in half["errors"]
        assert row["ReLU times one half"] == ("" if lacks else row["ReLU twin"])  # it has the twin's errors
        assert row["difference to it"] == ("" if lacks else row["difference"])
    renew([str(w) for w in words])
    assert Sparta.from_pretrained(tmp_path / "sets" / SETS.name).info["audit"] == [export.NOT_AUDITED]
    renew([str(w) for w in (*words, "--audit", ours / "audit.json")])
    after = {name: (tmp_path / "sets" / SETS.name / name).read_bytes() for name in before}
    assert after[WEIGHTS] == before[WEIGHTS]
    assert after[CARD] != before[CARD]
    taken = Sparta.from_pretrained(tmp_path / "sets" / SETS.name)
    errors = json.loads((ours / "evaluation.json").read_text())["errors"]
    assert [row["error"] for row in taken.info["measured"]] == list(errors)
    assert taken.info["audit"][0].startswith("Error in the worst case")
    written = json.loads(shipped.read_text())[SETS.name]
    assert written["sha256"][CARD] == records.sha256(after[CARD])
