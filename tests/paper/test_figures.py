import json

import pytest
import torch

from examples.paper.common.models import build
from examples.paper.common.plotting import plt
from examples.paper.evaluation.networks import NETWORKS
from examples.paper.pictures import figures, loss
from examples.paper.training.command import main as train


@pytest.mark.parametrize("activation", ["relu", "sparta", "feature-denoising"])
def test_the_maps_are_those_before_and_after_the_activation(activation):
    model, x = build("resnet18", activation, "G*.B-1", width=8), torch.rand(2, 3, 32, 32)
    before, after = figures.feature_maps(model.train(), x, 2)
    assert model.training
    model.eval()
    with torch.no_grad():
        h = model.layer1(model.act1(model.bn1(model.conv1(model.normalize(x)))))
        h = model.layer2[0](h)
        block = model.layer2[1]
        known = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(h))))) + h
        torch.testing.assert_close(before, known.mean(1))
        torch.testing.assert_close(after, block.act2(known).mean(1))
    if activation == "relu":
        torch.testing.assert_close(after, known.clamp(min=0).mean(1))


def tiny_run(out, tiny_data, *more):
    sizes = ["--limit", 40, "--width", 8, "--epochs", 1, "--recipe", "fast"]
    arguments = ["--out", out, "--data", tiny_data, *sizes]
    train([str(a) for a in (*arguments, "--device", "cpu", *more)])
    return str(out / "checkpoint.pt")


def draw(*arguments):
    figures.main([str(a) for a in (*arguments, "--device", "cpu")])


@pytest.mark.slow
def test_the_command_draws_and_writes_its_numbers(tmp_path, tiny_data):
    paths = [tiny_run(tmp_path / a, tiny_data, "--activation", a) for a in ("relu", "sparta")]
    options = ["--data", tiny_data, "--limit", 8, "--steps", 3, "--out"]
    draw(*paths, *options, tmp_path / "one")
    for name in ("feature-maps", "loss"):
        assert (tmp_path / f"one/{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "one/loss.json").read_text())
    assert record["images"] == 8
    assert set(record["loss per step"]) == {"relu", "sparta"}
    curve = record["loss per step"]["relu"]
    assert len(curve["mean"]) == len(curve["std"]) == 3
    assert curve["mean"][2] < curve["mean"][0]  # a targeted attack lowers it
    difference = record["loss per step"]["sparta"]["mean"][2] - curve["mean"][2]
    assert record["minus the first"]["sparta"]["mean"][2] == pytest.approx(difference, abs=1e-5)
    draw(f"ReLU={paths[0]}", *options, tmp_path / "two")
    alone = json.loads((tmp_path / "two/loss.json").read_text())["loss per step"]["ReLU"]
    assert alone == curve  # the same attack, whatever else is drawn


def test_each_of_many_networks_has_a_curve():
    names = [f"network {i}" for i in range(8)]
    record = loss.numbers({name: torch.rand(3, 4) for name in names})
    figure, axes = plt.subplots(1, 2)
    loss._losses(axes[0], record["loss per step"])
    loss._differences(axes[1], record["minus the first"], names[0])
    drawn = [ax.get_legend_handles_labels()[1] for ax in axes]
    assert drawn[0][:8] == names
    assert drawn[1][::2] == [f"{name} minus network 0" for name in names[1:]]
    plt.close(figure)


def test_two_networks_of_one_folder_have_two_names():
    files = [str(NETWORKS / f"cifar10-resnet18-w16{s}.safetensors") for s in ("", "-relu")]
    assert list(figures.load(files)[0]) == ["cifar10-resnet18-w16", "cifar10-resnet18-w16-relu"]


def test_what_cannot_be_compared_is_refused(tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*nowhere\.pt; give the checkpoint"):
        draw(tmp_path / "nowhere.pt")
    (tmp_path / "mine.py").write_text(
        "from torch.nn import Flatten, Linear, Sequential\n\n\n"
        "def net():\n    return Sequential(Flatten(), Linear(3 * 32 * 32, 10))\n"
    )
    with pytest.raises(ValueError, match=r"layer1\[-1\]\.act2, which Sequential lacks; give networks"):
        draw("mine.py:net")
    with pytest.raises(ValueError, match="cannot use --device nowhere"):
        figures.main(["mine.py:net", "--device", "nowhere"])
    with pytest.raises(SystemExit):
        draw("mine.py:net", "--seed", 2**64)
    first = tiny_run(tmp_path / "a", tiny_data, "--activation", "relu")
    second = tiny_run(tmp_path / "b", tiny_data, "--activation", "relu", "--dataset", "mnist-m")
    with pytest.raises(ValueError, match="of cifar10 and mnist-m; draw one data set at a time"):
        draw(first, second)
    third = tiny_run(tmp_path / "other/a", tiny_data, "--activation", "relu")
    with pytest.raises(ValueError, match=f"two networks have the name a: {first}, {third}; .* NAME=FILE"):
        draw(first, third)
