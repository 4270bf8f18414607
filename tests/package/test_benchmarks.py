import importlib
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import identities, plain
from benchmarks.measuring import kept_bytes, multiply_adds, race
from benchmarks.plain import PlainSparta
from examples.paper.benchmarks.attack import attacks_on, check_attacks
from examples.paper.common.activations import FeatureDenoising
from examples.paper.training.command import main as train
from sparta_act import Sparta

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch, capsys):
    """Runs a script; its printed tables as rows of cells, and all that it printed."""

    def run(script, arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        printed = capsys.readouterr().out
        cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
        return {row[0].strip(): [c.strip() for c in row[1:]] for row in cells}, printed

    return run


@pytest.mark.slow
def test_the_epoch_benchmark_times_each_network(tables):
    small = "--width 8 --batch-size 4 --batches 1 --steps 1 --device cpu --activation relu sparta"
    rows, printed = tables("epoch.py", small)
    assert "times relu" in printed
    assert list(rows) == ["relu, none", "sparta, none"]
    assert all(float(r[0]) > 0 for r in rows.values())
    assert float(rows["relu, none"][1]) == 1.0


@pytest.mark.slow
def test_the_precision_benchmark_counts_who_changes_sides(tables, tmp_path):
    run = f"--out {tmp_path} --activation relu --recipe fast --epochs 1 --width 8 --limit 40 --device cpu"
    train(run.split())
    rows, _ = tables("precision.py", f"{tmp_path}/checkpoint.pt --limit 20 --steps 2 --device cpu")
    for how in ("bfloat16", "other start"):
        changed = [cell.split(", ") for cell in rows[f"{how}: more, fewer"]]
        for i, (more, fewer) in enumerate(changed):
            assert int(rows[f"wrong, {how}"][i]) - int(rows["wrong, float32"][i]) == int(more) - int(fewer)
    assert all(float(cell) > 0 for cell in rows["times as fast"])


@pytest.mark.slow
def test_the_autoattack_benchmark_counts_who_changes_sides(tables):
    network = FOLDER.parent / "examples/networks/cifar10-resnet18-w16.safetensors"
    rows, _ = tables("autoattack.py", f"{network} --limit 20 --steps 3 --queries 5 --device cpu")
    (itself,) = rows["wrong, the network itself"]
    for how in ("its copy", "itself, other seed"):
        more, fewer = map(int, rows[f"{how}: more, fewer"][0].split(", "))
        wrong = int(rows[f"wrong, {how}"][0].removesuffix(" of 20"))
        assert wrong - int(itself.removesuffix(" of 20")) == more - fewer
        assert 0 < wrong < 20
    assert float(rows["times as fast, its copy"][0]) > 0


@pytest.mark.slow
def test_the_network_benchmark_measures_every_contender(tables):
    rows, printed = tables("network.py", "--width 8 --batch-size 4 --rounds 1 --device cpu --compile none")
    for row in ("training, ms", "input grad, ms", "kept / relu"):
        assert all(float(cell) > 0 for cell in rows[row]), row
    assert rows["training / relu"][0].startswith("1.00")
    relu, plainly, fast = (float(cell) for cell in rows["multiply-adds / relu"])
    assert relu == 1 < fast < 1.2
    assert plainly == pytest.approx(fast, rel=0.05)  # the identities of today save memory and launches
    relu, plainly, fast = (float(cell) for cell in rows["kept / relu"])
    assert relu == 1 < fast < plainly
    assert "the same loss and gradients" in printed


@pytest.mark.slow
def test_the_site_benchmark_measures_every_activation(tables):
    rows, printed = tables("sites.py", "--batch-size 2 --rounds 1 --device cpu")
    assert printed.count("SPARTA, plainly") == 4
    *times, count, parameters, kept = rows["SPARTA"]  # of the last table, 512 channels at 4 x 4
    assert all(float(t) > 0 for t in times)
    filters = 9 * 512 * 32  # of conv1, conv2 and conv3
    at_places = 9 * filters + filters + 16 * filters + 16 * 9 * 32 + 9 * 9 * 512 + 16 * 9
    assert float(count) == pytest.approx((at_places + 9 * 16 * 512) / 1e6, abs=0.01)  # and the pool's product
    assert parameters == f"{3 * filters + 9 * 32 + 9 * 512 + 1:,}"
    assert 0 < float(kept) < float(rows["SPARTA, plainly"][-1])


@pytest.mark.slow
def test_the_identities_are_measured_after_they_are_checked(tables):
    rows, printed = tables("identities.py", "--batch-size 2 --rounds 1 --device cpu")
    assert all(float(cell) > 0 for row in rows.values() for cell in row if cell.strip("0."))
    assert printed.count("in use:") == printed.count("tried and left:") == 2


def test_a_wrong_identity_is_found():
    piece = identities.taken(2, 8, 6)["conv2 as a product"]
    identities.check_same("conv2", piece)
    with pytest.raises(ValueError, match="conv2: the two forms differ"):
        identities.check_same("conv2", piece._replace(other=lambda h, w: piece.other(h, w.flip(2))))


@pytest.mark.slow
def test_the_attack_benchmark_compares_with_what_is_installed(tables):
    rows, printed = tables("attack.py", "--width 8 --batch-size 4 --rounds 1 --steps 2 --device cpu")
    for name, module in {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}.items():
        try:
            importlib.import_module(module)
        except ImportError:
            assert f"{module}: not installed" in printed
            assert name not in rows
        else:
            assert float(rows[name][0]) > 0
    assert float(rows["attacks.pgd"][0]) > 0
    assert "float64, the same random start: equal to" in printed or "torchattacks: not" in printed


@pytest.mark.slow
def test_the_error_benchmark_judges_all_images_the_same(tables, tiny_data):
    rows, _ = tables("errors.py", f"--steps 2 --epochs 1 --data-dir {tiny_data} --device cpu")
    assert rows["images judged differently"] == ["0", "0"]
    assert all(float(cell) > 0 for cell in rows["factor, all images"])


@pytest.mark.slow
def test_the_training_benchmark_compares_two_equal_steps(tables):
    rows, printed = tables("training.py", "--width 8 --batch-size 4 --rounds 1 --steps 2 --device cpu")
    assert len(rows["Trainer.step, s"]) == 2
    assert printed.count("loss of the first step") == 2


def test_a_race_compares_within_rounds():
    laps = race({"one": lambda: time.sleep(0.01), "four": lambda: time.sleep(0.04)}, 3, "sleeping")
    assert laps["one"].ratio == 1
    assert 2 < laps["four"].ratio < 5
    assert laps["four"].spread[0] <= laps["four"].ratio <= laps["four"].spread[1]


def test_what_a_backward_keeps_and_what_is_multiplied():
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Sigmoid()), torch.rand(2, 8, requires_grad=True)
    assert multiply_adds(lambda: model(x)) == 2 * 8 * 4
    assert kept_bytes(model, lambda: model(x)) == 4 * (2 * 8 + 2 * 4)  # input and result
    denoising, y = FeatureDenoising(8), torch.rand(1, 8, 4, 4)
    convolutions, attention = 2 * 8 * 4 * 16 + 8 * 8 * 16, 2 * 16 * 16 * 8
    assert multiply_adds(lambda: denoising(y)) == convolutions + attention


@pytest.mark.parametrize("arguments", [{}, {"hidden": 2, "identity": True}, {"dynamic": False}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_plain_and_fast_are_one_function(arguments, n):
    fast, slow = (module(3, neighborhood=n, **arguments) for module in (Sparta, PlainSparta))
    x = torch.randn(2, 3, 6, 5)
    assert plain.check_same(fast, slow, x, lambda m, x: m(x).square().sum()) < 1e-12
    before = plain.awake(fast)(x)
    with torch.no_grad():
        fast.gain.mul_(2)
    assert not torch.allclose(fast(x), before, atol=1e-3)  # the gate was in it


def test_two_functions_are_not_timed_as_one():
    fast, slow, x = Sparta(3), PlainSparta(3), torch.randn(2, 3, 6, 5)

    def other(module, x):
        return (module(x) + 1e-6 * isinstance(module, PlainSparta) * x).square().sum()

    with pytest.raises(ValueError, match="two functions"):
        plain.check_same(fast, slow, x, other)


def test_another_attack_is_not_timed_as_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    same = {"naive loop": attacks_on(model)["naive loop"], "attacks.pgd": None}
    same["attacks.pgd"] = same["naive loop"]
    check_attacks(same, model, x, y, 2)
    same["weaker"] = lambda x, y, steps, start: same["naive loop"](x, y, steps - 1, start)
    with pytest.raises(ValueError, match="weaker computes another attack"):
        check_attacks(same, model, x, y, 2)
