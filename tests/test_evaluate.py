import json

import pytest
import torch
from torch import nn

from evaluate import difference, find_errors, interval, loss_curve, main, menu, percent, told


class Brightness(nn.Module):
    """Class 1 for images brighter than a half, class 0 for darker ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        bright = self.scale * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], 1)


def test_errors_are_those_of_a_model_we_know():
    levels = torch.tensor([20, 120, 135, 240], dtype=torch.uint8)  # of 255; the middle two are within 16/255
    x, y = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.tensor([0, 0, 1, 0])
    attacks = {"strong": {"eps": 16 / 255, "step_size": 4 / 255, "steps": 10}}
    wrong = find_errors(Brightness(), x, y, attacks, batch_size=3)
    assert wrong["clean"].tolist() == [False, False, False, True]
    assert wrong["strong"].tolist() == [False, True, True, True]


def test_the_menu_is_the_papers_and_the_modern_attack():
    paper = {"targeted": True, "eps": 16 / 255, "step_size": 1 / 255}
    assert menu([10, 50], 20, 1) == {
        "targeted PGD-10, 16/255": {**paper, "steps": 10},
        "targeted PGD-50, 16/255": {**paper, "steps": 50},
        "untargeted PGD-20, 8/255": {"targeted": False, "eps": 8 / 255, "step_size": 2 / 255, "steps": 20}
        | {"restarts": 1},
    }


def test_the_loss_curve_falls_for_a_targeted_attack_and_rises_for_an_untargeted_one():
    x, y = torch.full((3, 3, 4, 4), 0.5), torch.tensor([0, 1, 0])
    for targeted, sign in ((True, -1), (False, 1)):
        curve, x_adv = loss_curve(Brightness(), x, y, eps=0.1, step_size=0.02, steps=6, targeted=targeted)
        assert curve.shape == (6, 3)
        assert (sign * curve.diff(dim=0) > 0).all()
        assert x_adv.shape == x.shape


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (315, 1000, 0.2870, 0.3445)],
)
def test_intervals_are_wilsons(count, n, low, high):
    wrong = torch.arange(n) < count
    assert interval(wrong) == pytest.approx((count / n, low, high), abs=1e-4)
    assert percent(torch.arange(1000) < 315) == "31.5% (28.7-34.4)"


def test_differences_are_paired():
    a, b = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool(), torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).bool()
    d, half = difference(a, b)  # +1 twice, -1 once, of eight
    assert d == pytest.approx(1 / 8)
    assert half == pytest.approx(1.959964 * (3 / 8 - 1 / 64) ** 0.5 / 8**0.5)
    assert told(0.05, 0.02) == "+5.0 ± 2.0"
    assert told(-0.01, 0.02) == "-1.0 ± 2.0 (noise)"
    assert difference(a, a) == (0, 0)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.pt"):
        main([str(tmp_path / "nowhere.pt")])


@pytest.mark.slow
def test_two_checkpoints_are_compared(tmp_path, capsys, tiny_data):
    import train

    for activation in ("relu", "swish-relu"):
        run = [
            "--out",
            tmp_path / activation,
            "--activation",
            activation,
            "--recipe",
            "fast",
            "--epochs",
            "1",
        ]
        train.main([str(a) for a in (*run, "--data-dir", tiny_data, "--width", 8, "--device", "cpu")])
    paths = [str(tmp_path / a / "checkpoint.pt") for a in ("relu", "swish-relu")]
    main([*paths, "--data-dir", tiny_data, "--steps", "2", "--untargeted-steps", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "targeted PGD-2, 16/255" in printed
    assert "±" in printed
    record = json.loads((tmp_path / "relu/evaluation.json").read_text())
    assert record["images"] == 20
    assert len(record["loss per step"]) == 2
    assert record["loss per step"][1] < record["loss per step"][0]
    assert set(record["errors"]) == {"clean", "targeted PGD-2, 16/255", "untargeted PGD-2, 8/255"}
