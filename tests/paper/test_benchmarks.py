import importlib

import pytest
import torch
from torch import nn

from examples.paper.benchmarks.attack import attacks_on, check_attacks


@pytest.mark.slow
def test_the_attack_benchmark_compares_with_what_is_installed(tables):
    rows, printed = tables(
        "examples.paper.benchmarks.attack", "--width 8 --batch-size 4 --rounds 1 --steps 2 --device cpu"
    )
    for name, module in {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}.items():
        try:
            importlib.import_module(module)
        except ImportError:
            assert f"{module}: not installed" in printed
            assert name not in rows
        else:
            assert float(rows[name][0]) > 0
    assert float(rows["pgd"][0]) > 0
    assert "float64, the same random start: equal to" in printed or "torchattacks: not" in printed


@pytest.mark.slow
def test_the_error_benchmark_judges_all_images_the_same(tables, tiny_data):
    rows, _ = tables(
        "examples.paper.benchmarks.errors", f"--steps 2 --epochs 1 --data {tiny_data} --device cpu"
    )
    assert rows["images judged differently"] == ["0", "0"]
    assert all(float(cell) > 0 for cell in rows["factor, all images"])


@pytest.mark.slow
def test_the_training_benchmark_compares_two_equal_steps(tables):
    rows, printed = tables(
        "examples.paper.benchmarks.training", "--width 8 --batch-size 4 --rounds 1 --steps 2 --device cpu"
    )
    assert len(rows["Trainer.step, s"]) == 2
    assert printed.count("loss of the first step") == 2


def test_another_attack_is_not_timed_as_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    same = {"naive loop": attacks_on(model)["naive loop"], "pgd": None}
    same["pgd"] = same["naive loop"]
    check_attacks(same, model, x, y, 2)
    same["weaker"] = lambda x, y, steps, start: same["naive loop"](x, y, steps - 1, start)
    with pytest.raises(ValueError, match="weaker computes another attack"):
        check_attacks(same, model, x, y, 2)
