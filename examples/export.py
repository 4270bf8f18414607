"""From a training run to a set: `python examples/export.py runs/sparta --twin runs/relu --out my-set`.

Takes SPARTA out of `RUN/checkpoint.pt`, rounds it to float16 as it will be stored, and measures the network
with the rounded weights, beside the checkpoint of a ReLU twin if one is given.
"""

import argparse
from pathlib import Path

import torch

import data
from command_line import at_least, plain_errors
from measure import find_errors, menu
from report import difference, percent, stamp, told
from sparta_act import Sparta, SpartaSet
from train import load_trained


def activations_of(model: torch.nn.Module) -> dict[str, Sparta]:
    """Activations of a network of `models.py` by their label: `layer1.1.act2` is at G1.B2."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Sparta):
            group, block, _ = name.removeprefix("layer").split(".")
            found[f"G{group}.B{int(block) + 1}"] = module
    return found


def round_to_half(activations: dict[str, Sparta]) -> None:
    """Round every floating number of the activations, in place, to what float16 holds."""
    for module in activations.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half().float()


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder that train.py wrote, of a network with SPARTA")
    p.add_argument("--twin", type=Path, help="folder of the run of its ReLU twin, measured beside it")
    p.add_argument("--out", type=Path, required=True, help="folder of the set, made where need be")
    p.add_argument(
        "--data-dir", default="sample", help="'sample' (ours), 'hub', or a folder of parquet files"
    )
    p.add_argument("--limit", type=at_least(1), help="attack the first so many test images only")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    runs = {"SPARTA": args.run} | ({"ReLU twin": args.twin} if args.twin else {})
    if missing := [str(r / "checkpoint.pt") for r in runs.values() if not (r / "checkpoint.pt").exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; train.py writes it")
    networks = {name: load_trained(run / "checkpoint.pt") for name, run in runs.items()}
    model, settings = networks["SPARTA"]
    activations = activations_of(model)
    if not activations:
        raise SystemExit(f"{args.run}: its network has no SPARTA, its activation is {settings['activation']}")
    round_to_half(activations)

    dataset = settings["dataset"]
    x, y = (t[: args.limit] for t in data.load("test", args.data_dir, dataset))
    wrong = {}
    for name, (network, _) in networks.items():
        torch.manual_seed(args.seed)
        wrong[name] = find_errors(network, x, y, menu([10, 50], 20, 1), title=name)
    measured = []
    for attack, w in wrong["SPARTA"].items():
        row = {"error": attack, "SPARTA": percent(w)}
        if args.twin:
            other = wrong["ReLU twin"][attack]
            row |= {"ReLU twin": percent(other), "difference": told(*difference(w, other))}
        measured.append(row)
    info = {
        "backbone": f"{settings['arch']} of width {settings['width']} (examples/models.py)",
        "dataset": data.DATASETS[dataset].hub or dataset,
        "recipe": settings,
        "measured": measured,
        "measured on": f"{len(x)} test images, the first of the split; 95% intervals; seed {args.seed}",
        **stamp(),
    }
    SpartaSet(activations, info).save_pretrained(args.out)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    with plain_errors():
        main()
