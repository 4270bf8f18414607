"""What is in the files of a set, `model.safetensors` and `config.json`: made whole and read strictly."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from sparta_act.activations import Sparta
from sparta_act.errors import WeightsError, readable
from sparta_act.pretrained.folder import CONFIG, LARGEST_CONFIG, WEIGHTS, configs, read, stamp
from sparta_act.pretrained.parsing import parse

FORMAT = 2  # 1 held an activation that is gone
DTYPES = {"float16": torch.float16, "float32": torch.float32}
CONFIG_TYPES = {"format": int, "dtype": str, "weights_sha256": str, "sites": dict, "info": dict}
SITES = 1000  # in a set, as in a file that can be trusted
LARGEST = {"in_channels": 2**16, "hidden": 2**16, "neighborhood": 2**12}
ARGUMENTS = {"in_channels": int, "hidden": int, "identity": bool, "dynamic": bool, "neighborhood": int}
SITE_TYPES = ARGUMENTS | {"shapes": dict}


def pack(activations: Mapping[str, Sparta], info: Mapping[str, Any], dtype: torch.dtype) -> dict[str, bytes]:
    """Weights and configuration of a set, as the bytes of its files.

    Raises `WeightsError` for a module, a number or a piece of `info` that the files cannot hold.
    """
    dtypes = [name for name, known in DTYPES.items() if known == dtype]
    if not dtypes:
        known = " or ".join(map(str, DTYPES.values()))
        raise WeightsError(f"cannot save the set: dtype must be {known}, not {dtype!r}; nothing was written")
    wrong = list[str]()
    sites: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for label, activation in activations.items():
        if type(activation) is not Sparta:
            wrong.append(f"{label} is a {type(activation).__name__}, not a Sparta")
            continue
        sites[label] = {name: getattr(activation, name) for name in ARGUMENTS} | {
            "shapes": _shapes(activation)
        }
        for key, value in activation.state_dict().items():
            if value.is_meta:
                wrong.append(f"{label}.{key} is on the meta device and has no numbers")
                continue
            if hasattr(value, "full_tensor"):
                wrong.append(f"{label}.{key} is sharded (FSDP): gather it into a network that is not")
                continue
            whole = value.detach().cpu()
            stored = tensors[f"{label}.{key}"] = whole.to(dtype, copy=True).contiguous()
            if not stored.isfinite().all():
                wrong.append(f"{label}.{key} is not finite in {dtype}")
            elif key != "gain" and (stored - whole).abs().sum() > whole.abs().sum() / 1000:
                wrong.append(f"{label}.{key} is too small for {dtype}")  # and would be 0, or rough
    if not wrong:  # what loads must be what is saved: not pruned, nor of another shape
        try:
            wrong = _differences(_states(_build_sites(sites)), tensors, dtype)
        except WeightsError as error:
            wrong = [str(error)]
    if wrong:
        narrow = any(str(torch.float16) in problem for problem in wrong)
        hint = ". What float16 cannot hold can be saved with dtype=torch.float32" if narrow else ""
        raise WeightsError(f"cannot save the set: {'; '.join(wrong)}; nothing was written{hint}")
    weights = safetensors.save(
        tensors, {"sites": json.dumps(sites)}
    )  # one entry: several have no fixed order
    config = {
        "format": FORMAT,
        "dtype": dtypes[0],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),  # so that files of two sets never mix
        "sites": sites,
        "info": dict(info),
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False).encode()
        parse(text)  # numbers as names may become the same text
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"cannot save the set: JSON cannot hold its info ({readable(error)}); nothing was written. Use "
            f"texts, finite numbers, booleans, None, lists and dictionaries"
        ) from error
    if len(text) > LARGEST_CONFIG:
        raise WeightsError(
            f"cannot save the set: {CONFIG} would have {len(text)} bytes, more than {LARGEST_CONFIG}; "
            f"nothing was written. Keep what is large in info in a file of its own"
        )
    return {WEIGHTS: weights, CONFIG: text}


def unpack(folder: Path) -> tuple[dict[str, Sparta], dict[str, Any]]:
    """Activations and info from the files in `folder`, on the CPU in float32.

    Raises `WeightsError`, which lists all problems, unless every key, shape, dtype and number is right.
    """
    for _ in range(100):
        before, problems = stamp(folder), list[WeightsError]()
        for config in configs(folder):
            try:
                return _unpack(config, folder / WEIGHTS)
            except WeightsError as error:
                problems.append(error)
        if stamp(folder) == before:  # else it was saved meanwhile
            break
    raise problems[0]


def _unpack(config_path: Path, weights_path: Path) -> tuple[dict[str, Sparta], dict[str, Any]]:
    text = read(config_path, LARGEST_CONFIG)
    try:
        config = parse(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{CONFIG} cannot be read ({type(error).__name__}: {error})") from error
    activations = _build(config)
    numbers = sum(math.prod(value.shape) for value in _states(activations).values())
    weights = read(weights_path, 4 * numbers + 4 * len(text) + 2**20)  # float32, and a header
    if hashlib.sha256(weights).hexdigest() != config["weights_sha256"]:
        raise WeightsError(
            f"{WEIGHTS} is not the file that {CONFIG} was written with: cut off, changed or mixed up"
        )
    try:
        found = safetensors.load(weights)
    except Exception as error:  # safetensors raises several kinds of its own
        raise WeightsError(f"{WEIGHTS} is no safetensors file ({type(error).__name__}: {error})") from error
    wrong = _differences(_states(activations), found, DTYPES[config["dtype"]])
    if wrong:
        raise WeightsError(f"{WEIGHTS} does not fit {CONFIG}: {'; '.join(wrong)}")
    if (written := _sites_of(weights)) != config["sites"]:
        changes = _changes(config["sites"], written)
        raise WeightsError(f"the sites in {CONFIG} are not those that {WEIGHTS} was written with{changes}")
    for label, activation in activations.items():
        state = {key: found[f"{label}.{key}"].to(torch.float32, copy=True) for key in activation.state_dict()}
        activation.load_state_dict(state, assign=True)
    return activations, config["info"]


def _build(config: Any) -> dict[str, Sparta]:
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise WeightsError(f"{CONFIG} has format {found!r}, this version of sparta-act reads {FORMAT}")
    wrong = _mistyped(CONFIG, config, CONFIG_TYPES)
    if not wrong and config["dtype"] not in DTYPES:
        wrong.append(f"{CONFIG}: dtype {config['dtype']!r} is not one of {list(DTYPES)}")
    if wrong:
        raise WeightsError("; ".join(wrong))
    return _build_sites(config["sites"])


def _build_sites(sites: Mapping[str, Any]) -> dict[str, Sparta]:
    activations, wrong = {}, list[str]()
    if len(sites) > SITES:
        raise WeightsError(f"a set has at most {SITES} sites, not {len(sites)}")
    for label, site in sites.items():
        problems = _mistyped(label, site, SITE_TYPES)
        if not problems:
            problems = [
                f"{label}: {name} is at most {largest} in a set, not {site[name]}"
                for name, largest in LARGEST.items()
                if site[name] > largest
            ]
        if not problems:
            try:
                with torch.device("meta"):  # takes no memory and draws no random numbers
                    activations[label] = Sparta(**{name: site[name] for name in ARGUMENTS})
            except (ValueError, TypeError, RuntimeError, OverflowError) as error:
                problems.append(f"{label}: {error}")
            else:
                if site["shapes"] != (shapes := _shapes(activations[label])):
                    problems.append(
                        f"{label}: shapes {site['shapes']} are not those of its arguments, {shapes}"
                    )
        wrong += problems
    if wrong:
        raise WeightsError("; ".join(wrong))
    return activations


def _sites_of(weights: bytes) -> Any:
    """The sites as `pack` wrote them with the tensors: `identity` and `neighborhood` change no shape."""
    length = int.from_bytes(weights[:8], "little")  # of the header, which safetensors has checked
    try:
        return parse(parse(weights[8 : 8 + length])["__metadata__"]["sites"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _changes(sites: Mapping[str, Mapping[str, Any]], written: Any) -> str:
    """How the sites differ from those written, as text."""
    changes = []
    for label, site in sites.items():
        was = written.get(label) if isinstance(written, dict) else None
        if isinstance(was, dict):
            changes += [
                f"{label} had {k} {was.get(k)!r}, not {v!r}" for k, v in site.items() if was.get(k) != v
            ]
    return f": {'; '.join(changes)}" if changes else ""


def _states(activations: Mapping[str, Sparta]) -> dict[str, Tensor]:
    return {
        f"{label}.{key}": value
        for label, activation in activations.items()
        for key, value in activation.state_dict().items()
    }


def _shapes(activation: Sparta) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in activation.named_parameters()}


def _mistyped(what: str, entries: Any, types: Mapping[str, type]) -> list[str]:
    found = {key: type(entry) for key, entry in entries.items()} if isinstance(entries, dict) else {}
    wrong = [f"no {key!r}" for key in types.keys() - found.keys()]
    wrong += [f"unknown {key!r}" for key in found.keys() - types.keys()]
    wrong += [
        f"{key!r} a {found[key].__name__}, not {types[key].__name__}"
        for key in found.keys() & types.keys()
        if found[key] is not types[key]
    ]
    return [f"{what} has {', '.join(sorted(wrong))}"] if wrong else []


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    wrong = [f"no {key}" for key in wanted.keys() - found.keys()]
    wrong += [f"unknown {key}" for key in found.keys() - wanted.keys()]
    for key in wanted.keys() & found.keys():
        shape = wanted[key].shape
        if found[key].shape != shape or found[key].dtype != dtype:
            is_ = f"{tuple(found[key].shape)} {found[key].dtype}"
            wrong.append(f"{key} is {is_}, not {tuple(shape)} {dtype}")
        elif not found[key].isfinite().all():
            wrong.append(f"{key} is not finite")
    return sorted(wrong)
