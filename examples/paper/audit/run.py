"""One audit: attack, check, write. From Python: `audit(model, x, y, out=folder)`."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors
from examples.paper.audit import attacks
from examples.paper.audit.budget import Budget
from examples.paper.audit.checks import all_checks
from examples.paper.audit.figure import draw
from examples.paper.audit.page import markdown, provenance
from examples.paper.audit.store import Store
from examples.paper.audit.verdicts import mean
from examples.paper.audit.victim import Victim
from examples.paper.common.atomic import write_text
from examples.paper.common.console import stamp
from examples.paper.common.records import sealed, sha256, write_record
from examples.paper.common.statistics import entry
from examples.paper.evaluation import networks
from examples.pgd import check_images

GATES = ("gate", "gate, attacked")


@torch.inference_mode(False)
def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    out: Path,
    eps: float = 8 / 255,
    seed: int = 0,
    budget: Budget | None = None,
    surrogates: dict[str, nn.Module] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Attack a network, check the results, write the files, and return the content of audit.json.

    `surrogates`: networks to transfer images from, by name. `about`: what else the results depend on, such as
    the network's sha256. An audit in `out` goes on if all of this is the same. The network is put into
    evaluation mode.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), both where the model is.
    Raises `ValueError` for other images or labels, for a network that cannot classify such images, or if a
    library is missing.
    """
    check_images(x, y)
    if not 0 < eps < attacks.LARGEST:
        raise ValueError(f"eps must lie between 0 and 128/255, the largest that check 4 tries, not {eps:.3g}")
    x, y, budget, surrogates = x.detach().clone(), y.clone(), budget or Budget(), surrogates or {}
    fresh = networks.copied(model.eval())
    networks.check(model, x, y)
    for name, surrogate in surrogates.items():
        _check_surrogate(name, surrogate.eval(), model, x, y)
    if any(isinstance(p, UninitializedTensorMixin) for p in fresh.parameters()):
        fresh = networks.copied(model)  # the check's images gave a lazy network its weights
    known = (about or {}) | {"eps": eps, "seed": seed, "budget": vars(budget), "surrogates": list(surrogates)}
    known["images"] = sha256(x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes())
    known["networks"] = [networks.fingerprint(n, x) for n in (model, *surrogates.values())]
    known["device"] = x.device.type
    versions = {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack")}
    model = networks.in_float32(model, x)
    out.mkdir(parents=True, exist_ok=True)
    store = Store(x.cpu(), y.cpu(), out / "audit.safetensors", json.dumps(known | versions))
    attacks.attack_all(Victim(model, x, y, eps, seed), store, budget, surrogates)
    store.numbers["evidence"] = check_evidence(fresh, x, y, store, eps)
    record = known | stamp() | results(store)
    record = sealed(record)
    write_record(out / "audit.json", record)
    title = f"# Audit: {record.get('network', 'network')}"
    write_text(out / "audit.md", f"{title}\n\n{markdown(record)}\n{provenance(record)}\n")
    draw(out / "audit.png", record, store)
    return record


def _check_surrogate(name: str, surrogate: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise `ValueError` for a surrogate that cannot be attacked, or is the audited network itself."""
    try:
        networks.check(surrogate, x, y)
    except ValueError as error:
        raise ValueError(f"surrogate {name}: {error}") from error
    logits, slopes = zip(*(_answer(network, x[:2]) for network in (model, surrogate)), strict=True)
    if logits[0].shape != logits[1].shape:
        classes = [t.shape[1] for t in logits]
        raise ValueError(
            f"surrogate {name} tells {classes[1]} classes apart, the audited network {classes[0]}"
        )
    if torch.equal(*logits) and torch.equal(*slopes):
        raise ValueError(
            f"surrogate {name} answers like the audited network and has its gradients: it changes nothing. "
            "Does its function find what it looks for?"
        )


def _answer(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their squares."""
    x = x.clone().requires_grad_()
    with torch.enable_grad(), attacking(network):
        logits = network(x.clone())
        (grad,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), grad


def check_evidence(fresh: nn.Module, x: Tensor, y: Tensor, store: Store, eps: float) -> dict[str, Any]:
    """Classify the stored images with a copy of the network that has seen no image, in another order.

    Where no attack broke an image, its last image under PGD must not fool the copy either.
    """
    images, broken = store.images.to(x), store.broken().to(x.device)
    clipped = images.clamp(x - eps, x + eps).clamp_(0, 1)
    order = torch.arange(len(x) - 1, -1, -1, device=x.device)
    wrong = torch.zeros_like(broken)
    with attacking(fresh):
        wrong[order] = clean_errors(fresh, images[order], y[order], batch_size=97)
    return {
        "images": int(broken.sum()),
        "wrong again": int((wrong & broken).sum()),
        "changed": int((wrong != broken).sum()),
        "within eps": bool((images - clipped).abs().max() <= 1e-6),
    }


def results(store: Store) -> dict[str, Any]:
    """The store for JSON, with the checks; of the gates' numbers per image only the means."""
    numbers = store.numbers
    return {
        "seconds": round(sum(numbers["seconds"].values())),
        "worst case": entry(store.broken()),
        "attacks": {name: entry(wrong) for name, wrong in store.wrong.items()},
        "evidence": numbers["evidence"],
        "checks": [row._asdict() for row in all_checks(store)],
        "numbers": {k: v for k, v in numbers.items() if k not in (*GATES, "evidence")},
    } | {
        key: {
            site: {k: mean(g[k]).value for k in ("closed", "open", "ratio")} | {"histogram": g["histogram"]}
            for site, g in numbers[key].items()
        }
        for key in GATES
    }
