"""Load a network from a checkpoint, from a file of weights, or from a function that makes it."""

import argparse
import copy
import functools
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.paper.common import data
from examples.paper.common.atomic import atomic_write
from examples.paper.common.gates import gates, round_to_half
from examples.paper.common.models import build
from examples.paper.common.records import sha256
from examples.paper.training.checkpoint import load_trained

NAMES = "the checkpoint.pt of `train`, a .safetensors of `network`, or FILE.py:FUNCTION"
NETWORKS = Path(__file__).parents[2] / "networks"  # those that ship, and their twins
SETTINGS = ("arch", "activation", "sites", "width", "dataset")
SUMS = "SHA256SUMS"  # of the files beside it, as `sha256sum` writes them


def split_place(where: str) -> tuple[Path, str]:
    """The file of a network, and the function in it, if one makes the network."""
    path, _, function = where.rpartition(":") if ".py:" in where else (where, "", "")
    return Path(path), function


def short_name(where: str) -> str:
    """Short name of a network: the folder of a checkpoint, a file's name, or a function's."""
    path, function = split_place(where)
    return function or (path.parent.name if path.suffix == ".pt" else path.stem)


def load(where: str, audited: nn.Module | None = None) -> tuple[nn.Module, str | None, bytes]:
    """Network in evaluation mode, its data set where that is known, and the bytes it was made from.

    `where`: a checkpoint, whose SPARTA is rounded to float16, as a set stores it; a file that `save` wrote;
    or `FILE.py:FUNCTION`, a function that returns the network, without arguments or of a copy of `audited`.
    A network takes images in [0, 1] and returns logits.
    Raises `ValueError` or `OSError` with what is wrong.
    """
    path, function = split_place(where)
    if not path.exists():
        raise ValueError(f"there is no {path}; give {NAMES}")
    if path.suffix == ".py" and not function:
        raise ValueError(f"{path} makes no network by itself: name its function, {path}:FUNCTION")
    content = path.read_bytes()
    if function:
        return _made(path, function, audited), None, content
    if path.suffix == ".safetensors":
        _check_sum(path, content)
        model, dataset = _stored(path)
    else:
        model, settings = load_trained(path)
        if content != path.read_bytes():
            raise ValueError(f"{path} was written anew just now, as its training goes on; load it again")
        round_to_half(gates(model))
        dataset = settings["dataset"]
    return model.eval(), dataset, content


def save(checkpoint: Path, path: Path) -> None:
    """Write the network of a checkpoint, without its optimizer and in float16, as a file to pass on."""
    model, settings = load_trained(checkpoint)
    if settings["pretrained"]:
        raise ValueError(
            f"{checkpoint} has the SPARTA of {settings['pretrained']}, which a file of weights lacks"
        )
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if lost := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise ValueError(f"{checkpoint}: float16 does not hold {', '.join(lost)}")
    with atomic_write(path) as scratch:
        save_file(tensors, scratch, {"settings": json.dumps({k: settings[k] for k in SETTINGS})})
        scratch.chmod(0o644)  # safetensors writes for its owner alone


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise `ValueError` if the network does not answer x (N, C, H, W) with logits for labels y (N,)."""
    few = x[:2].clone()
    try:
        with torch.no_grad():
            logits = model(few)
    except Exception as error:  # a third-party network may raise anything
        raise ValueError(
            f"the network was given images {tuple(few.shape)} and raised {_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network must return logits ({len(few)}, classes), and returned {found}")
    if logits.shape[1] <= int(y.max()) or logits.shape[1] < 4:
        raise ValueError(
            f"the network tells {logits.shape[1]} classes apart; these images have {int(y.max()) + 1}, and "
            "the targeted DLR loss needs at least 4"
        )
    if not logits.isfinite().all():
        raise ValueError("the network's logits are not finite")
    if not torch.equal(few, x[:2]):
        raise ValueError("the network changes its input in place: give it one that works on a copy")
    with torch.enable_grad():
        logits = model(few.clone().requires_grad_().clone())
    if not logits.requires_grad:
        raise ValueError(
            "the logits do not depend on the images by autograd (no_grad, detach or numpy inside?): "
            "white-box attacks have no gradient to follow, and their errors mean nothing"
        )


def fingerprint(model: nn.Module, x: Tensor) -> str:
    """sha256 of the network's state and of its answers to x, which tells networks apart."""
    with torch.no_grad():
        answers = [model(part.clone()).float().cpu() for part in x.split(250)]
    return sha256(*(t.contiguous().numpy().tobytes() for t in answers), *numbers(model))


def numbers(model: nn.Module) -> list[bytes]:
    """The bytes of each tensor of the network's state that has any."""
    state = [v.detach().cpu().reshape(-1).view(torch.uint8) for v in model.state_dict().values() if v.numel()]
    return [v.numpy().tobytes() for v in state]


def copied(model: nn.Module) -> nn.Module:
    """A copy of the network; itself where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError):
        return model


class InFloat32(nn.Module):
    """A network whose logits come in float32, which the attacks' libraries take for granted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K)."""
        return self.model(x).to(x.dtype)


def in_float32(model: nn.Module, x: Tensor) -> nn.Module:
    """The network, in `InFloat32` if its logits need it. Shapes: x (N, C, H, W)."""
    with torch.no_grad():
        return model if model(x[:1]).dtype == x.dtype else InFloat32(model).eval()


def _made(path: Path, function: str, audited: nn.Module | None) -> nn.Module:
    module = _executed(path.resolve())
    make: Any = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{path} has no function {function!r}")
    needed = _arguments(make)
    if needed > (audited is not None):
        takes = "no argument" if audited is None else "none, or one: the audited network"
        raise ValueError(f"{path}:{function} needs {needed} arguments; such a function takes {takes}")
    given = [_copy_of(audited, f"{path}:{function}")] if audited is not None and needed else []
    try:
        model = make(*given)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}:{function} raised {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path}:{function} must return a network, not {type(model).__name__}")
    return model.eval()


@functools.cache  # once a process: a class of the file is the same in the network and in its surrogate
def _executed(path: Path) -> ModuleType:
    name = f"audited_{path.stem}"  # torch.py must not replace torch
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for it there
    sys.path.append(str(path.parent))  # for its imports from the same folder
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a third-party file may raise anything, or exit
        raise ValueError(f"{path} raised {_line(error)}") from error
    return module


def _copy_of(audited: nn.Module, place: str) -> nn.Module:
    """A copy for a surrogate's function to change: the audited network itself must stay."""
    try:
        return copy.deepcopy(audited)
    except Exception as error:
        raise ValueError(
            f"{place} takes the audited network, which cannot be copied ({_line(error)}): give a function "
            "without arguments that makes the surrogate"
        ) from error


def _arguments(make: Any) -> int:
    """How many arguments a function must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # of a builtin
        return 0
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _stored(path: Path) -> tuple[nn.Module, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "settings" not in metadata:
                raise ValueError("it has no settings")
            settings = json.loads(metadata["settings"])
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (no mapping)
        if set(settings) != set(SETTINGS):
            raise ValueError(f"its settings are {list(settings)}, must be {list(SETTINGS)}")
        if settings["dataset"] not in data.DATASETS:
            raise ValueError(f"no data set {settings['dataset']!r}; there are {', '.join(data.DATASETS)}")
        model = build(**settings, num_classes=len(data.DATASETS[settings["dataset"]].classes))
        check_tensors(state, model.state_dict(), torch.float16)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except KeyError as error:  # of a network or an activation that there is not
        raise ValueError(f"{path} is no file of weights that `network` wrote: unknown {error}") from None
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of weights that `network` wrote: {error}") from None
    return model, settings["dataset"]


def check_tensors(state: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise `ValueError` unless tensors of a file are those of a network, floats finite and of this dtype."""
    for name in (*wanted, *state):
        if name not in wanted or name not in state:
            raise ValueError(f"{'Unexpected' if name in state else 'Missing'} key {name}")
        kind = dtype if wanted[name].is_floating_point() else wanted[name].dtype
        found, given = (tuple(wanted[name].shape), kind), (tuple(state[name].shape), state[name].dtype)
        if found != given:
            raise ValueError(f"size mismatch or wrong dtype: {name} is {given}, must be {found}")
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


def _check_sum(path: Path, content: bytes) -> None:
    """Raise `ValueError` if the folder's list has the file with another sha256."""
    listed = path.with_name(SUMS)
    sums = dict(reversed(line.split()) for line in listed.read_text().splitlines()) if listed.exists() else {}
    if path.name in sums and sums[path.name] != sha256(content):
        raise ValueError(f"{path} has changed: its sha256 is not that in {listed}; restore it")


def main(argv: list[str] | None = None) -> None:
    """Write a network to pass on."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper network",
        description="Write the network of a checkpoint as a file to pass on: the weights alone, in float16.",
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint.pt of `train`")
    p.add_argument("out", type=Path, help="file of weights, NAME.safetensors")
    args = p.parse_args(argv)
    if not args.checkpoint.exists():
        raise ValueError(f"there is no {args.checkpoint}; `train` writes checkpoint.pt into its --out")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out} must be a .safetensors")
    save(args.checkpoint, args.out)
    content = args.out.read_bytes()
    print(f"written: {args.out}, {len(content):,} bytes; its sha256 is {sha256(content)}")
