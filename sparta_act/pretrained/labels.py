"""Under which labels the activations of an edited network are found."""

from collections import Counter

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparta_act.activations import Sparta

HOLDERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)  # their child is called `module`
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # by torch.compile and others


def labelled(model: nn.Module) -> dict[str, Sparta]:
    """Every `Sparta` of a network, once, by the site that it was put at, else by its dotted name.

    Where several have one label, as in two backbones, they go by their dotted names, without wrappers.
    """
    found = {
        plain_name(model, name) or "sparta": m for name, m in model.named_modules() if isinstance(m, Sparta)
    }
    labels = {name: str(vars(m).get("sparta_site") or name) for name, m in found.items()}
    count = Counter(labels.values())
    labels = {name: label if count[label] == 1 else name for name, label in labels.items()}
    if len({*labels.values()}) < len(labels):  # a dotted name is the label of another
        labels = {name: name for name in labels}
    return {labels[name]: m for name, m in found.items()}


def plain_name(model: nn.Module, name: str) -> str:
    """The dotted name of a module, as if there were no wrappers around it."""
    kept, module = list[str](), model
    for part in filter(None, name.split(".")):
        if part not in WRAPPED and not (part == "module" and isinstance(module, HOLDERS)):
            kept.append(part)
        module = module._modules[part]  # type: ignore[assignment]
    return ".".join(kept)
