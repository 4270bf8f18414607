"""The convolutional networks that public libraries offer, with random weights, each with an input."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import peers  # noqa: F401  (torchvision can be imported after it)

Example = tuple[Any, ...]
NOT_CONVOLUTIONAL = re.compile(r"vit_|swin|mvit|maxvit")

# name: class of the configuration and of the model
TRANSFORMERS = {
    "resnet": ("ResNetConfig", "ResNetForImageClassification"),
    "regnet": ("RegNetConfig", "RegNetForImageClassification"),
    "bit": ("BitConfig", "BitForImageClassification"),
    "textnet": ("TextNetConfig", "TextNetForImageClassification"),
    "hgnet_v2": ("HGNetV2Config", "HGNetV2ForImageClassification"),
    "rt_detr_resnet": ("RTDetrResNetConfig", "RTDetrResNetBackbone"),
    "superpoint": ("SuperPointConfig", "SuperPointForKeypointDetection"),
    "mobilenet_v1": ("MobileNetV1Config", "MobileNetV1ForImageClassification"),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification"),
    "swiftformer": ("SwiftFormerConfig", "SwiftFormerForImageClassification"),
    "efficientnet": ("EfficientNetConfig", "EfficientNetForImageClassification"),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification"),
    "mobilevitv2": ("MobileViTV2Config", "MobileViTV2ForImageClassification"),
    "levit": ("LevitConfig", "LevitForImageClassification"),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification"),
    "encodec": ("EncodecConfig", "EncodecModel"),
}
CLASSES = {"in_channels": 1, "out_channels": 2}
UNET = {**CLASSES, "channels": (8, 16, 32), "strides": (2, 2)}
# name: function, dimensions, further arguments, size of the input of one channel
MONAI: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "resnet10, 3-D": ("resnet10", 3, {"n_input_channels": 1}, 32),
    "resnet18, 1-D": ("resnet18", 1, {"n_input_channels": 1}, 256),
    "resnet50, 3-D": ("resnet50", 3, {"n_input_channels": 1}, 32),
    "SEResNet50, 3-D": ("SEResNet50", 3, {"in_channels": 1}, 64),
    "DenseNet121, 1-D": ("DenseNet121", 1, CLASSES, 256),
    "DenseNet121, 3-D": ("DenseNet121", 3, CLASSES, 64),
    "SegResNet, 2-D": ("SegResNet", 2, {}, 64),
    "SegResNet, 3-D": ("SegResNet", 3, {}, 32),
    "BasicUNet, 3-D": ("BasicUNet", 3, {}, 32),
    "UNet, 3-D": ("UNet", 3, {**UNET, "num_res_units": 2}, 32),
    "UNet with ReLU, 1-D": ("UNet", 1, {**UNET, "act": "relu"}, 64),
    "AttentionUnet, 2-D": ("AttentionUnet", 2, UNET, 64),
    "VNet, 3-D": ("VNet", 3, {}, 32),
    "HighResNet, 3-D": ("HighResNet", 3, {}, 32),
}


class Network(NamedTuple):
    """Library and name of a network; picklable, for worker processes."""

    package: str
    name: str


def build(network: Network) -> tuple[nn.Module, Example]:
    """The network, with random weights of seed 0, and arguments for a call."""
    torch.manual_seed(0)
    return BUILDERS[network.package](network.name)


def _torchvision(name: str) -> tuple[nn.Module, Example]:
    import torchvision

    kind = torchvision.models.get_model_builder(name).__module__
    more: dict[str, Any] = {"weights_backbone": None} if re.search("detection|segmentation", kind) else {}
    model = torchvision.models.get_model(name, weights=None, **more)
    if "detection" in kind:  # the whole detector needs boxes and torchvision's own operators
        return model.backbone, (torch.rand(2, 3, 320, 320),)
    if "video" in kind:
        return model, (torch.rand(2, 3, 16, 224, 224) if name == "s3d" else torch.rand(2, 3, 8, 64, 64),)
    if "optical_flow" in kind:
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    size = 299 if "inception" in name else 96
    return model, (torch.rand(2, 3, size, size),)


def _timm(name: str) -> tuple[nn.Module, Example]:
    import timm

    model = timm.create_model(name)
    channels, native, _ = model.pretrained_cfg["input_size"]
    for size in (128, native):
        x = torch.rand(2, channels, size, size)
        if size == native or _runs(model, x):
            break
    return model, (x,)


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            model.eval()(x)
    except Exception:  # libraries raise anything for a size they do not support
        return False
    return True


def _transformers(name: str) -> tuple[nn.Module, Example]:
    import transformers

    config, model = (getattr(transformers, c) for c in TRANSFORMERS[name])
    if name == "encodec":
        return model(config()), (torch.rand(2, 1, 2048),)
    size = {"convnext": 64, "superpoint": 64}.get(name, 224)
    return model(config()), (torch.rand(2, 3, size, size),)


def _smp(name: str) -> tuple[nn.Module, Example]:
    import segmentation_models_pytorch as smp

    return smp.create_model(name, "resnet18", encoder_weights=None), (torch.rand(2, 3, 128, 128),)


def _monai(name: str) -> tuple[nn.Module, Example]:
    from monai.networks import nets

    function, dimensions, arguments, size = MONAI[name]
    model = getattr(nets, function)(spatial_dims=dimensions, **arguments)
    return model, (torch.rand(2, 1, *[size] * dimensions),)


BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Example]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "segmentation_models_pytorch": _smp,
    "monai": _monai,
}


def names(library: str) -> list[str]:
    """The networks of a library; of timm all, from which `smallest` chooses. Raises `ImportError`."""
    if library == "torchvision":
        import torchvision

        return [n for n in torchvision.models.list_models() if not NOT_CONVOLUTIONAL.search(n)]
    if library == "timm":
        import timm

        return list(timm.list_models())
    if library == "segmentation_models_pytorch":
        import segmentation_models_pytorch as smp

        return [n for n in smp.MODEL_ARCHITECTURES_MAPPING if n not in ("segformer", "dpt")]
    __import__(library)
    return list(TRANSFORMERS if library == "transformers" else MONAI)


class _Layers(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.relus = self.convolutions = self.linear = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").rstrip("_")
        if name == "relu":
            self.relus += result.ndim == 4 and result.shape[2:].numel() > 1
        self.convolutions += name == "conv2d"
        self.linear += name == "linear"
        return result


def size_of(name: str) -> int:
    """Parameters of a network of timm, if it is convolutional and has ReLU on feature maps; else 0."""
    import timm

    layers = _Layers()
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        with layers:
            model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    if not layers.relus or layers.convolutions <= layers.linear:
        return 0
    return sum(p.numel() for p in model.parameters())


def smallest(sizes: dict[str, int]) -> list[str]:
    """The network with the fewest parameters among the names that differ in numbers alone."""
    families: dict[str, str] = {}
    for name in sorted((n for n, size in sizes.items() if size), key=lambda n: (sizes[n], n)):
        families.setdefault(re.sub(r"\d+", "#", name), name)
    return sorted(families.values())
