"""SPARTA in a minute on a CPU, without a download: load, look, attack, draw a picture."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from models import ResNet18, load_network
from pgd import is_wrong, pgd
from sparta_act import Sparta, relu_sites, replace_relus

NETWORKS = Path(__file__).with_name("networks")
ATTACK = {"eps": 8 / 255, "step_size": 2 / 255}
STEPS = (0, 1, 2, 4, 7, 10)  # where the loss is measured


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """Number and share of the images that the network gets wrong."""
    with torch.no_grad():
        count = int(is_wrong(model(x), y).sum())
    return f"{count} of {len(x)} wrong ({count / len(x):.1%})"


def loss_after(steps: int, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss after some steps of PGD, from the same start for every number of steps; without any, of x."""
    torch.manual_seed(0)
    x_adv = pgd(model, x, y, steps=steps, **ATTACK) if steps else x
    with torch.no_grad():
        return F.cross_entropy(model(x_adv), y).item()


def place_scores(model: nn.Module, x: Tensor) -> Tensor:
    """Score of each place at the first Sparta of the network. Shapes: (N, 3, H, W) -> (N, H, W)."""
    first, seen = next(m for m in model.modules() if isinstance(m, Sparta)), []
    with torch.no_grad(), first.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs)):
        model(x)
        return first.scores(seen[0])[0][:, 0]


def class_names(numbers: Tensor) -> list[str]:
    """Names of CIFAR-10's classes. Shapes: (N,)."""
    return [data.Cifar.classes[i] for i in numbers.tolist()]


def draw(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, curves: dict[str, list[float]]) -> None:
    """Images, what the attack adds, the scores of their places before and after, and the losses."""
    before, after = place_scores(model, x), place_scores(model, x_adv)
    columns = {
        "image": x.permute(0, 2, 3, 1),
        "perturbation,\n± 8/255": ((x_adv - x) / (16 / 255) + 0.5).clamp(0, 1).permute(0, 2, 3, 1),
        "attacked image": x_adv.permute(0, 2, 3, 1),
        "scores at G1.B2,\nimage": before,
        "scores at G1.B2,\nattacked image": after,
        "change of\nthe scores": after - before,
    }
    figure = plt.figure(figsize=(11, 1.5 * len(x) + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    axes = left.subplots(len(x), len(columns))
    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, image in zip(column, images, strict=True):
            shown = ax.imshow(image.clamp(-3, 3), cmap="RdBu_r", vmin=-3, vmax=3)
            ax.set(xticks=(), yticks=())
    with torch.no_grad():
        clean, attacked = (class_names(model(images).argmax(1)) for images in (x, x_adv))
    for row, truth, first, last in zip(axes, class_names(y), clean, attacked, strict=True):
        row[0].set_xlabel(f"true: {truth}\nseen: {first}", fontsize=9)
        row[2].set_xlabel(f"seen: {last}", fontsize=9)
    left.colorbar(shown, ax=axes, label="score of a place, and its change", shrink=0.7)
    left.suptitle("The attack hardly changes the scores that SPARTA gives to places")
    plot = right.subplots()
    for name, values in curves.items():
        plot.plot(STEPS, values, marker="o", label=name)
    plot.set(
        xticks=STEPS,
        xlabel="steps of PGD",
        ylabel="loss of the true class",
        title="The attack raises\nboth losses alike",
    )
    plot.legend()
    figure.savefig("quickstart.png", dpi=200)


def main() -> None:
    """Go through the four steps."""
    torch.manual_seed(0)
    print("1. Load trained activations, frozen, into a new network: the last ReLU of each group.")
    network = ResNet18(num_classes=100)
    replace_relus(network, "G*.B-1", Sparta.from_pretrained("cifar10-resnet18"))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {trained:,} of them train")

    print("\n2. Look: which ReLUs can be replaced, and which are?")
    print(relu_sites(network))

    print("\n3. Attack a slim network with trained SPARTA, and its twin with ReLU.")
    x, y = (t[:200] for t in data.read_cifar("test"))
    x, curves = x.float() / 255, {}
    for name, file in (("ReLU", "cifar10-resnet18-w16-relu"), ("SPARTA", "cifar10-resnet18-w16")):
        model = load_network(NETWORKS / f"{file}.safetensors")
        torch.manual_seed(0)
        x_adv = pgd(model, x, y, steps=10, **ATTACK)
        print(f"{name}: clean {wrong(model, x, y)}; PGD-10 at 8/255 {wrong(model, x_adv, y)}")
        curves[name] = [loss_after(steps, model, x[:25], y[:25]) for steps in STEPS]
    print("ReLU does as well: this shows how SPARTA works, and no gain. The picture is quickstart.png.")
    draw(model, x[:4], y[:4], x_adv[:4], curves)


if __name__ == "__main__":
    main()
