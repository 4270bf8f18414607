"""Adversarial training with SPARTA (Madry et al. 2018): attack each batch, learn from the attacked images.

`python adversarial_training.py` trains a small ResNet on our sample of CIFAR-10, in minutes on a CPU.
`python adversarial_training.py --data my_folder --network torchvision/resnet18 --size 224` takes your images.
`accelerate launch adversarial_training.py ...` uses several GPUs, or `--mixed_precision bf16`.
"""

import argparse
import os
import sys
import zipfile
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from models import make_network
from pgd import check_numbers, is_wrong, pgd
from sparta_act import Sparta, SpartaSet, replace_relus


def put_activation(network: nn.Module, activation: str, sites: str, identity: bool) -> None:
    """Replace the ReLUs at `sites`, in place: by fresh Spartas, by a frozen set, or not at all ("relu")."""
    if activation != "relu":
        new = partial(Sparta, identity=identity) if activation == "sparta" else activation
        replace_relus(network, sites, new)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, the gain of each Sparta by itself: weight decay would pull its gate towards a constant."""
    gains = {m.gain for m in network.modules() if isinstance(m, Sparta)}
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p not in gains], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in gains], "weight_decay": 0.0},
    ]


def train_epoch(accelerator: Any, model: nn.Module, batches: Any, parts: Any, attack: Any) -> float:
    """Train `model`, in place, for one epoch; return the mean loss on the attacked images."""
    (network, optimizer, schedule), losses = parts, []
    for x, y in batches:
        x_adv = attack(network.eval(), x, y)  # attacked as it will be used
        loss = F.cross_entropy(model.train()(x_adv), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def evaluate(accelerator: Any, network: nn.Module, batches: Any, attack: Any) -> list[int]:
    """Number of test images, of those that are wrong, and of those that are wrong when attacked."""
    network.eval()
    counts = torch.zeros(3, dtype=torch.long)
    for x, y in batches:
        x_adv = attack(network, x, y)
        with torch.no_grad():
            rows = torch.stack([y == y, is_wrong(network(x), y), is_wrong(network(x_adv), y)], 1)
        counts += accelerator.gather_for_metrics(rows).sum(0).cpu()
    return counts.tolist()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state. A run that is killed at any moment leaves the old checkpoint or the new one."""
    scratch = path.with_suffix(".tmp")
    scratch.unlink(missing_ok=True)  # of a killed run; the folder's lock keeps others out
    try:
        with scratch.open("xb") as file:  # a new file: a link that lies there would be followed
            torch.save(state, file)
        scratch.replace(path)
    except (OSError, RuntimeError) as error:  # torch's for a full disk
        scratch.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.__context__ or error}); an old one is whole") from error


def load_checkpoint(path: Path, resume: bool, settings: dict[str, str]) -> dict[str, Any]:
    """The state to go on from, empty at the start. Raises `ValueError` rather than overwrite another run."""
    if not path.exists():
        return {}
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not look at the checksums that it writes
            if (bad := parts.testzip()) or any(part.external_attr for part in parts.infolist()):
                raise ValueError(f"{bad} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        changed = [f"{k} was {before[k]}, is {v}" for k, v in settings.items() if before[k] != v]
    except Exception as error:  # of pickle, zipfile or torch, by what the file is
        raise ValueError(f"{path} is not a checkpoint of this program, or damaged") from error
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): give another --out")
    if not resume:
        raise ValueError(f"{path} exists: continue that run with --resume, or give another --out")
    return state


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="sample", help="sample, hub (all of CIFAR-10) or a folder; see data.py")
    p.add_argument("--size", type=int, default=64, help="of your own images, in pixels (default 64)")
    p.add_argument("--network", default="resnet18", help="resnet18, torchvision/NAME or timm/NAME")
    p.add_argument("--width", type=int, default=16, help="channels of resnet18's first group (default 16)")
    p.add_argument("--init", help="weights with ReLU, .safetensors, for any classes; Spartas start as ReLU")
    p.add_argument("--sites", default="G*.B-1", help="which ReLUs (default: the last one of each group)")
    p.add_argument("--activation", default="sparta", help="sparta, relu, or a set, which stays frozen")
    p.add_argument("--eps", default="8/255", help="bound of the attack, a fraction of 1 (default 8/255)")
    p.add_argument("--step-size", default="10/255", help="of the attack (default 10/255)")
    p.add_argument("--steps", type=int, default=1, help="of the attack; default 1 (Wong et al. 2020)")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--lr", type=float, default=0.1, help="highest learning rate (default 0.1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("my-run"), help="folder of the checkpoint and the set")
    p.add_argument("--resume", action="store_true", help="continue the run of --out, if there is one")
    return p


def prepare(args: argparse.Namespace, settings: dict[str, str]) -> tuple[Any, ...]:
    """State to go on from, data sets, network. Raises for options that cannot work."""
    args.eps, args.step_size = float(Fraction(args.eps)), float(Fraction(args.step_size))
    check_numbers(eps=args.eps, step_size=args.step_size)
    if min(args.steps, args.epochs, args.batch_size, args.size) < 1 or not 0 <= args.lr < float("inf"):
        raise ValueError("steps, epochs, sizes are at least 1; lr is at least 0")
    if not 0 <= args.seed < 2**31:
        raise ValueError("seed is at least 0 and below 2**31")
    load_checkpoint(args.out / "checkpoint.pt", args.resume, settings)  # before the images, which may be many
    set_seed(args.seed)
    train_set, test_set = data.load(args.data, args.size)
    network = make_network(args.network, len(train_set.classes), width=args.width, init=args.init)
    put_activation(network, args.activation, args.sites, identity=args.init is not None)
    args.out.mkdir(parents=True, exist_ok=True)  # nothing is left where the options were refused
    lock = FileLock(args.out / "lock", timeout=0)
    try:
        if os.environ.get("RANK", "0") == "0":  # the first process holds it for all, as long as it lives
            lock.acquire()
    except Timeout:
        raise ValueError(f"another training writes into {args.out}: give another --out") from None
    state = load_checkpoint(args.out / "checkpoint.pt", args.resume, settings)
    return state | {"lock": lock}, train_set, test_set, network


def main() -> None:
    """Train, evaluate, save the set."""
    args = (p := parser()).parse_args()
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "resume")}
    try:
        state, train_set, test_set, network = prepare(args, settings)
    except (ValueError, ArithmeticError, RuntimeError, OSError, ImportError) as error:
        p.error(str(error))

    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    accelerator = Accelerator(dataloader_config=order)
    workers = getattr(train_set, "workers", min(4, os.cpu_count() or 1))
    load = partial(DataLoader, batch_size=args.batch_size, num_workers=workers)
    batches = load(train_set, shuffle=True, drop_last=len(train_set) > args.batch_size)
    sgd = torch.optim.SGD(parameter_groups(network, 5e-4), lr=args.lr, momentum=0.9, nesterov=True)
    model, sgd, batches, test_batches = accelerator.prepare(network, sgd, batches, load(test_set))
    schedule = OneCycleLR(sgd, args.lr, args.epochs * len(batches))
    parts = {"network": network, "optimizer": sgd, "schedule": schedule}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])

    bar = partial(tqdm, leave=False, disable=not accelerator.is_main_process)
    attack = partial(pgd, eps=args.eps, step_size=args.step_size, steps=args.steps)
    for epoch in range(state.get("epoch", 0), args.epochs):
        set_seed(args.seed + epoch, device_specific=True)  # a resumed run draws what an unbroken one draws
        batches.set_epoch(epoch)
        loss = train_epoch(accelerator, model, bar(batches), parts.values(), attack)
        accelerator.print(f"epoch {epoch + 1} of {args.epochs}: loss {loss:.3f} on attacked images")
        if accelerator.is_main_process:
            known = {"epoch": epoch + 1, "settings": settings}
            known |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(args.out / "checkpoint.pt", known)

    set_seed(args.seed, device_specific=True)
    pgd10 = partial(pgd, eps=args.eps, step_size=args.eps / 4, steps=10)
    n, clean, attacked = evaluate(accelerator, network, bar(test_batches), pgd10)
    measured = {"clean": f"{clean} of {n} wrong", "PGD-10": f"{attacked} of {n} wrong"}
    accelerator.print("test images:", "; ".join(f"{k} {v}" for k, v in measured.items()))
    if args.activation == "sparta" and accelerator.is_main_process:
        info = {"backbone": args.network, "measured": measured, "recipe": settings}
        print("saved:", SpartaSet.of(network, info).save_pretrained(args.out / "set"))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
