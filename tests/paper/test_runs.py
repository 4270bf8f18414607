"""Runs of the queue by its commands: states, transfers, budgets, and what is filed."""

import dataclasses
import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.paper.common.lock import lock
from examples.paper.common.records import packed, unpacked
from examples.paper.common.statistics import format_error
from examples.paper.evaluation import evaluate
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.results import command, export, schedule
from examples.paper.results.state import RESULTS, State
from examples.paper.training import loop
from examples.paper.training.checkpoint import load_trained, read_checkpoint
from examples.paper.training.command import parser
from tests.helpers.fixtures import write_parquet
from tests.helpers.queues import QUICK, SMALL, call, page, run

ROOT = Path(__file__).parents[2]


def change_entry(place):
    (place / "queue.toml").write_text(SMALL.replace('activation = "sparta"', 'activation = "sparta-static"'))


def test_a_changed_entry_never_files_the_old_network(place, capsys):
    run(place, "short-sparta")
    change_entry(place)
    call(place, "status")
    assert "changed" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="began with other settings: activation was 'sparta', is 'sparta-static'"
    ):
        run(place, "short-sparta")
    with pytest.raises(ValueError, match="waiting for short-sparta, whose set is not in"):
        run(place, "short-sparta-from-sparta")
    filed = json.loads((place / "results/short-sparta.json").read_text())
    assert filed["settings"]["activation"] == "sparta"
    assert "\n\nNot measured yet: Table 2.\n" in page(place)


def test_a_transfer_run_trains_around_the_frozen_set(place):
    with pytest.raises(ValueError, match="waiting for short-sparta"):
        run(place, "short-sparta-from-sparta")
    run(place, "short-sparta", "short-sparta-from-sparta")
    given, taken = (
        load_trained(place / f"runs/{n}/checkpoint.pt")[0].layer4[1].act2
        for n in ("short-sparta", "short-sparta-from-sparta")
    )
    assert taken.frozen
    torch.testing.assert_close(taken.conv3, given.conv3.half().float())
    assert not (place / "runs/short-sparta-from-sparta/set").exists()


def test_a_whole_set_is_taken_whatever_was_evaluated_of_its_network(place):
    run(place, "short-sparta")
    path = place / "runs/short-sparta/run.json"
    begun = json.loads(path.read_text())
    begun["settings"]["evaluation"] = "another"
    path.write_text(json.dumps(begun))
    half = place / "runs/short-sparta/set/config.json"
    config = half.read_bytes()
    half.unlink()
    with pytest.raises(ValueError, match="waiting for short-sparta"):
        run(place, "short-sparta-from-sparta")
    half.write_bytes(config)
    run(place, "short-sparta-from-sparta")
    assert (place / "results/short-sparta-from-sparta.json").exists()


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
    with pytest.raises(ValueError, match="needs the whole cifar10: --data FOLDER"):
        run(place, "short-relu")
    assert not (place / "runs").exists()


def test_the_data_of_all_named_runs_is_looked_for_before_the_first_begins(place):
    whole = SMALL.replace('activation = "sparta" }', 'activation = "sparta", sample = false, limit = 0 }')
    (place / "queue.toml").write_text(whole)
    with pytest.raises(ValueError, match="short-sparta needs the whole cifar10"):
        run(place, "short-relu", "short-sparta")
    assert not (place / "runs").exists()


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
    training, evaluation = (c.split()[4:] for c in result["commands"])
    args = parser().parse_args([a.strip("'") for a in training])
    assert (args.activation, args.epochs, args.width, args.sites) == ("relu", 1, 8, "G*.B-1")
    assert (args.seed, evaluation[evaluation.index("--seed") + 1]) == (3, "3")
    assert evaluation[0] == "runs/short-relu/checkpoint.pt"
    model, _ = load_trained(place / "runs/short-relu/checkpoint.pt")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_learning_rate_of_the_queue_replaces_that_of_the_recipe(place):
    (place / "queue.toml").write_text(SMALL.replace("seed = 0", "seed = 0\nlr = 0.025"))
    run(place, "short-relu")
    result = json.loads((place / "results/short-relu.json").read_text())
    assert result["last epoch"]["lr"] == result["settings"]["numbers"]["lr"] == 0.025
    assert parser().parse_args(shlex.split(result["commands"][0])[4:]).lr == 0.025
    (place / "queue.toml").write_text(SMALL)
    with pytest.raises(ValueError, match="short-relu: changed"):
        run(place, "short-relu")


def test_a_missing_autoattack_is_an_error_before_the_training(place, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(QUICK, autoattack=5))
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


@pytest.mark.slow
def test_the_smoke_run_goes_all_the_way(tmp_path, capsys):
    folders = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    python = [sys.executable, "-m", "examples.paper", "run", "smoke-sparta", "--device", "cpu", *folders]
    done = subprocess.run([str(a) for a in python], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    command.tables([str(f) for f in folders[2:]])
    command.status([str(f) for f in folders])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "smoke-sparta" in line)
    assert "done" in row
    assert "smoke: smoke 1 of 1" in printed
    error = json.loads((tmp_path / "results/smoke-sparta.json").read_text())["errors"]["clean"]
    cell = format_error(unpacked(error["wrong"], error["images"]))
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
        call(place, "status")
        assert "running" in capsys.readouterr().out
        with pytest.raises((ValueError, SystemExit), match="another process"):
            run(place, "short-relu")
        other.stdin.close()
    call(place, "status")
    assert "running" not in capsys.readouterr().out


def test_the_status_shows_how_far_an_epoch_is(place, capsys):
    folder = place / "runs/short-relu"
    folder.mkdir(parents=True)
    ends = datetime.datetime(2026, 11, 28, 17, 5)
    progress = {"epoch": 1, "images": 12_345, "images per second": 67.8, "ends": ends.timestamp()}
    shown = ", 12,345 images, 68 a second, ends Sat 17:05"
    with lock(folder):
        for text, detail in (
            (json.dumps(progress), shown),
            (json.dumps(progress | {"epoch": 2}), ""),  # of an epoch that the log has already
            ("{half", ""),
            ("[1]", ""),
            ('{"epoch": 1, "images": "many", "images per second": 1, "ends": 0}', ""),
            (json.dumps(progress | {"ends": 1e300}), ""),
        ):
            (folder / "progress.json").write_text(text)
            call(place, "status")
            (line,) = re.findall("^ *short-relu .*", capsys.readouterr().out, re.M)
            assert line.rstrip().endswith(f"running epoch 1 of 1{detail}")


def test_a_result_is_of_the_attacks_of_its_protocol(place, capsys):
    run(place, "short-relu")
    path = place / "results/short-relu.json"
    filed = json.loads(path.read_text())
    assert {name: e["images"] for name, e in filed["errors"].items()} == {
        "clean": 500,
        "targeted PGD-2, 16/255": 10,
        "untargeted PGD-2, 8/255": 10,
        "targeted DLR PGD-2, 8/255": 10,
        "worst case, 8/255": 10,
    }
    assert "--protocol quick" in filed["commands"][1]
    (place / "queue.toml").write_text(SMALL.replace('run = "sparta"', 'run = "relu"'))
    checkpoint = place / "runs/short-relu/checkpoint.pt"
    before = checkpoint.read_bytes()
    del filed["errors"]["targeted PGD-2, 16/255"]
    path.write_text(json.dumps(filed))
    assert "ours (500 images)" in page(place).split("## Table 2")[1]  # it shows what it has
    checkpoint.rename(place / "elsewhere.pt")
    capsys.readouterr()
    call(place, "status")
    assert "missing an older result is filed: it lacks targeted PGD-2, 16/255" in capsys.readouterr().out
    (place / "elsewhere.pt").rename(checkpoint)
    run(place, "short-relu")  # completes it, from the network that is there
    assert checkpoint.read_bytes() == before
    assert capsys.readouterr().out.count("was measured before") == 4
    assert "targeted PGD-2, 16/255" in json.loads(path.read_text())["errors"]


def test_the_next_run_is_one_that_nobody_has_begun(place, monkeypatch):
    monkeypatch.setattr(schedule, "state", lambda *_: State("missing"))  # as both saw it a moment ago
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


def test_bad_input_is_one_error_that_names_what_is_wrong(place):
    with pytest.raises((ValueError, SystemExit), match="short-relu"):
        run(place, "short-rel")
    with pytest.raises(SystemExit):
        run(place, "--next", "--budget", "soon")
    (place / "results").mkdir()
    entry = {"error": 0.5, "low": 0.4, "high": 0.6, "images": 8, "wrong": packed(torch.arange(8) < 3)}
    flipped = json.dumps({"settings": {}, "errors": {"clean": entry}})
    filed = json.loads((RESULTS / "smoke-sparta.json").read_text())
    damaged = [
        json.dumps(filed | {key: value})
        for key in ("settings", "last epoch", "parameters", "multiply-adds", "seconds per epoch", "machine")
        for value in ([], None, {"epoch": None})
        if (key, value) != ("settings", {"epoch": None})
    ]
    for text in (
        "{half",
        "[]",
        "null",
        "{}",
        '{"settings": {}, "errors": []}',
        "[" * 10**5,
        flipped,
        *damaged,
    ):
        (place / "results/short-sparta.json").write_text(text)
        for name in ("status", "tables"):
            with pytest.raises(
                ValueError, match=r"short-sparta\.json is not a result .*; restore it, or delete"
            ):
                call(place, name)
    (place / "queue.toml").write_text(SMALL.replace('"relu"', '"rellu"').replace("width = 8", 'width = "8"'))
    with pytest.raises(
        ValueError,
        match=r"short-relu.width: .*; runs.short-relu.activation: unknown 'rellu'; .*short-sparta.width: ",
    ):
        call(place, "status")
    (place / "queue.toml").write_text("epochs = [")
    with pytest.raises((ValueError, SystemExit), match=r"queue\.toml"):
        call(place, "status")


def test_what_is_trained_and_not_evaluated_says_so(place, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluations", lambda *_, **__: (s for s in [1000]))
    run(place, "short-relu", "--budget", "9m")
    capsys.readouterr()
    call(place, "status")
    assert "trained, not evaluated" in capsys.readouterr().out


def test_a_run_out_of_time_goes_on(place):
    (place / "queue.toml").write_text(SMALL.replace("short = { epochs = 1 }", "short = { epochs = 3 }"))
    run(place, "short-relu", "--budget", "0.001s")
    assert not list(place.rglob("short-relu.json"))
    run(place, "short-relu")
    assert read_checkpoint(place / "runs/short-relu/checkpoint.pt")["epoch"] == 3


def test_an_evaluation_stops_before_a_part_that_would_end_too_late(place, capsys, monkeypatch):
    parts = []

    def evaluations(*_, **__):
        for seconds in (0, 0, 1000):
            yield seconds
            parts.append(seconds)

    monkeypatch.setattr(evaluate, "evaluations", evaluations)
    run(place, "short-relu", "--budget", "10m")
    assert parts == [0, 0]
    printed = capsys.readouterr().out
    assert "short-relu: trained; its evaluation is not done, out of time" in printed
    assert "go on with the same command" in printed
    assert not list(place.rglob("short-relu.json"))
    monkeypatch.undo()
    run(place, "short-relu")
    assert (place / "results/short-relu.json").exists()


VALIDATED = SMALL.replace("epochs = 1", "epochs = 3").replace("limit = 40", "limit = 40\nvalidation = 10")


@pytest.mark.parametrize(("errors", "best"), [([0.5, 0.3, 0.4], 2), ([0.5, 0.4, 0.3], 3)])
def test_the_best_epoch_is_filed_with_the_last(place, monkeypatch, errors, best):
    found = iter(errors)
    monkeypatch.setattr(loop, "validation_error", lambda *_: next(found))
    (place / "queue.toml").write_text(VALIDATED.replace("paper = [15.48]", "best = true"))
    run(place, "short-sparta")
    folder, filed = place / "runs/short-sparta", json.loads((place / "results/short-sparta.json").read_text())
    assert filed["training images"] == 30
    assert "--validation 10" in filed["commands"][0]
    assert (filed["best epoch"]["epoch"], filed["last epoch"]["epoch"]) == (best, 3)
    assert filed["best epoch"]["validation error"] == min(errors)
    last, chosen = (export.measured(folder / f) for f in (".", "best"))
    assert "runs/short-sparta/best/checkpoint.pt" in filed["commands"][1]
    assert (folder / "best/evaluation.npz").exists()
    assert filed["best errors"] == chosen["errors"]
    assert filed["errors"] == last["errors"]
    error = {"low": 0.6, "high": 0.8, "images": 10, "error": 0.7, "wrong": packed(torch.arange(10) < 7)}
    filed["best errors"]["clean"] = error
    (place / "results/short-sparta.json").write_text(json.dumps(filed))
    text = page(place)
    assert "| SPARTA | 70.0% (39.7-89.2) |\n" in text
    assert f") | {best} | " in text
    (place / "results/short-sparta.json").unlink()  # another run's best epoch is not filed as this one's
    state = torch.load(folder / "best/checkpoint.pt", weights_only=True)
    torch.save(state | {"settings": state["settings"] | {"seed": 7}}, folder / "best/checkpoint.pt")
    with pytest.raises(ValueError, match=r"best.checkpoint\.pt, .* is of another run"):
        run(place, "short-sparta")


def test_a_best_epoch_that_no_table_shows_is_not_evaluated(place, monkeypatch):
    found = iter([0.4, 0.5, 0.6])
    monkeypatch.setattr(loop, "validation_error", lambda *_: next(found))
    (place / "queue.toml").write_text(VALIDATED)
    run(place, "short-sparta")
    filed = json.loads((place / "results/short-sparta.json").read_text())
    assert (place / "runs/short-sparta/best/checkpoint.pt").exists()
    assert not (place / "runs/short-sparta/best/evaluation.npz").exists()
    assert "best" not in filed["commands"][1]
    assert not filed.keys() & {"best errors", "best epoch"}
    row = '"sparta", best = true, paper'
    (place / "queue.toml").write_text(VALIDATED.replace('"sparta", paper', row))  # a table shows it later
    assert "Not measured yet: Table 2." in page(place)
    run(place, "short-sparta")
    assert (place / "runs/short-sparta/best/evaluation.npz").exists()
    assert "best errors" in json.loads((place / "results/short-sparta.json").read_text())
