"""Under which labels the activations of an edited network are found."""

from collections import Counter

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparta_act.activations import PLACE, Sparta

HOLDERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)  # their child is called `module`
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # by torch.compile and others


def labelled(model: nn.Module) -> dict[str, Sparta]:
    """Every `Sparta` of a network, once, by the site that it, or a module around it, was put at.

    Without a site it goes by its dotted name.
    Where several have one label, as in two backbones, they go by their dotted names, without wrappers.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, Sparta)]
    ways = dict(_way(model, name) for name in names)
    sites = {name: [s for m in way if (s := vars(m).get(PLACE))] for name, way in ways.items()}
    labels = {name: str(of_one[-1] if of_one else name) for name, of_one in sites.items()}
    count = Counter(labels.values())
    labels = {name: label if count[label] == 1 else name for name, label in labels.items()}
    if len({*labels.values()}) < len(labels):  # a dotted name is the label of another
        labels = {name: name for name in labels}
    return {labels[name]: way[-1] for name, way in ways.items()}  # type: ignore[misc]


def _way(model: nn.Module, name: str) -> tuple[str, list[nn.Module]]:
    """The dotted name of a module, without wrappers, and the modules that lead to it, itself the last."""
    kept, way = list[str](), [model]
    for part in filter(None, name.split(".")):
        if part not in WRAPPED and not (part == "module" and isinstance(way[-1], HOLDERS)):
            kept.append(part)
        way.append(way[-1]._modules[part])  # type: ignore[arg-type]
    return ".".join(kept) or "sparta", way
