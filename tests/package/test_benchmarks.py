import time

import pytest
import torch
from torch import nn

from benchmarks import identities, plain
from benchmarks.measuring import multiply_adds, race, saved_bytes
from benchmarks.plain import PlainSparta
from examples.paper.common.activations import FeatureDenoising
from examples.paper.pictures import cost
from sparta_act import Sparta


@pytest.mark.slow
def test_the_network_benchmark_measures_every_contender(tables, tmp_path):
    arguments = "--width 8 --batch-size 4 --rounds 1 --device cpu --compile none"
    rows, printed = tables("benchmarks.network", f"{arguments} --record {tmp_path}/record.json")
    for row in ("training, ms", "input grad, ms", "saved / relu"):
        assert all(float(cell) > 0 for cell in rows[row]), row
    assert rows["training / relu"][0].startswith("1.00")
    relu, plainly, fast = (float(cell) for cell in rows["multiply-adds / relu"])
    assert relu == 1 < fast < 1.2
    assert plainly == pytest.approx(fast, rel=0.05)  # the identities of today save memory and launches
    relu, plainly, fast = (float(cell) for cell in rows["saved / relu"])
    assert relu == 1 < fast < plainly
    assert "the same loss and gradients" in printed
    ((network, ratios),) = cost.read(tmp_path).items()
    assert network == "resnet18 width 8, 32 x 32"
    shown = {row: f"{ratio.value:.2f}" for row, ratio in ratios.items()}
    printed_as = {"memory kept\nfor backward": "saved / relu", "training step,\ntime": "training / relu"}
    for row, name in printed_as.items():
        assert rows[name][2].split()[0] == shown[row]


@pytest.mark.slow
def test_the_site_benchmark_measures_every_activation(tables):
    rows, printed = tables("benchmarks.sites", "--batch-size 2 --rounds 1 --device cpu")
    assert printed.count("SPARTA, plainly") == 4
    *times, count, parameters, saved = rows["SPARTA"]  # of the last table, 512 channels at 4 x 4
    assert all(float(t) > 0 for t in times)
    filters = 9 * 512 * 32  # of conv1, conv2 and conv3
    at_places = 9 * filters + filters + 16 * filters + 16 * 9 * 32 + 9 * 9 * 512 + 16 * 9
    assert float(count) == pytest.approx((at_places + 9 * 16 * 512) / 1e6, abs=0.01)  # and the pool's product
    assert parameters == f"{3 * filters + 9 * 32 + 9 * 512 + 1:,}"
    assert 0 < float(saved) < float(rows["SPARTA, plainly"][-1])


@pytest.mark.slow
def test_the_identities_are_measured_after_they_are_checked(tables):
    rows, printed = tables("benchmarks.identities", "--batch-size 2 --rounds 1 --device cpu")
    assert all(float(rows[f"{piece} as a product"][-1]) > 0 for piece in ("pool", "conv2"))  # times as fast
    assert printed.count("batch 2") == 2


def test_a_wrong_identity_is_found():
    piece = identities.identities(2, 8, 6)["conv2 as a product"]
    identities.check_same("conv2", piece)
    with pytest.raises(ValueError, match="conv2: the two forms differ"):
        identities.check_same("conv2", piece._replace(ours=lambda h, w: piece.ours(h, w.flip(2))))


def test_a_race_compares_within_rounds():
    laps = race({"one": lambda: time.sleep(0.01), "four": lambda: time.sleep(0.04)}, 3, "sleeping")
    assert laps["one"].ratio == 1
    assert 2 < laps["four"].ratio < 5
    assert laps["four"].spread[0] <= laps["four"].ratio <= laps["four"].spread[1]


def test_bytes_saved_for_backward_and_multiply_adds():
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Sigmoid()), torch.rand(2, 8, requires_grad=True)
    assert multiply_adds(lambda: model(x)) == 2 * 8 * 4
    assert saved_bytes(model, lambda: model(x)) == 4 * (2 * 8 + 2 * 4)  # input and result
    denoising, y = FeatureDenoising(8), torch.rand(1, 8, 4, 4)
    convolutions, attention = 2 * 8 * 4 * 16 + 8 * 8 * 16, 2 * 16 * 16 * 8
    assert multiply_adds(lambda: denoising(y)) == convolutions + attention


@pytest.mark.parametrize("arguments", [{}, {"hidden": 2, "identity": True}, {"dynamic": False}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_plain_and_fast_are_one_function(arguments, n):
    fast, slow = (module(3, neighborhood=n, **arguments) for module in (Sparta, PlainSparta))
    torch.nn.init.ones_(fast.gain)  # or the gate of `identity` would be constant
    x = torch.randn(2, 3, 6, 5)
    assert plain.check_same(fast, slow, x, lambda m, x: m(x).square().sum()) < 1e-12
    before = fast(x)
    with torch.no_grad():
        fast.gain.mul_(2)
    assert not torch.allclose(fast(x), before, atol=1e-3)  # the gate was in it


def test_two_functions_are_not_timed_as_one():
    fast, slow, x = Sparta(3), PlainSparta(3), torch.randn(2, 3, 6, 5)

    def other(module, x):
        return (module(x) + 1e-6 * isinstance(module, PlainSparta) * x).square().sum()

    with pytest.raises(ValueError, match="two functions"):
        plain.check_same(fast, slow, x, other)
