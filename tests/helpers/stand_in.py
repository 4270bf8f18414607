"""A second device for tests, where there is no GPU: tensors on it refuse those of the CPU as a GPU's do.

What runs on it is computed by the CPU's kernels. Code that passes on it may still fail on a GPU for what it
does not imitate: kernels that a GPU lacks, CUDA's own random generators, compiled networks.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, library
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "stand_in"
COPIES = {"copy_", "_foreach_copy_"}  # from one device to the other
INDEXED = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}  # by the CPU's indices too
FILLED = {"fill", "fill_", "masked_fill", "masked_fill_"}  # by a number of the CPU
HALVED = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "prelu")  # by autocast
FACTORIES = {  # torch's own way would be to resize a tensor, which ours do not follow
    "": "empty_strided full zeros ones eye scalar_tensor linspace arange rand randn randperm randint",
    ".start": "arange",
    ".start_step": "arange",
    ".low": "randint",
    ".low_generator": "randint",
    ".generator": "rand randn randperm randint",
    ".memory_format": "empty",
}
_libraries = []  # what is registered stays while they live


@functools.cache
def install() -> str:
    """Make the device known to torch, for the rest of the process; returns its name."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    everything, aten = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    _libraries.extend([everything, aten])
    everything.fallback(_run, "PrivateUse1")
    names = [name + overload for overload, names in FACTORIES.items() for name in names.split()]
    for name in ["copy_", *names]:  # torch.tensor copies past `__torch_dispatch__`
        op = functools.reduce(getattr, f"{name}.default".split(".")[:2], torch.ops.aten)
        aten.impl(name, functools.partial(_run, op), "PrivateUse1")
    everything.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALVED:
        op = getattr(torch.ops.aten, name).default
        aten.impl(name, functools.partial(_halved, op), "AutocastPrivateUse1")
    return NAME


def is_possible() -> bool:
    """Whether this torch can have a device that is written in Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class OnDevice(Tensor):
    """A tensor of the device; `home` holds its numbers on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __module__ = "torch"  # foolbox asks
    home: Tensor

    @staticmethod
    def __new__(cls, home: Tensor) -> "OnDevice":
        layout = {"strides": home.stride(), "storage_offset": home.storage_offset(), "dtype": home.dtype}
        self = Tensor._make_wrapper_subclass(cls, home.shape, device=torch.device(NAME, 0), **layout)
        self.home = home
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))

    def __tensor_flatten__(self) -> Any:  # tells `Module.to` to swap whole tensors
        return ["home"], None

    def __repr__(self) -> str:
        return f"{NAME}: {self.home!r}"

    def __deepcopy__(self, memo: Any) -> "OnDevice":
        if id(self) not in memo:
            memo[id(self)] = twin = OnDevice(self.home.clone()).requires_grad_(self.requires_grad)
            vars(twin).update(copy.deepcopy({k: v for k, v in vars(self).items() if k != "home"}, memo))
            twin.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        rest = self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.cpu(), *rest)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.home.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first"
            )
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError("incompatible tensor type: a tensor of another device cannot become its data")
        Tensor.data.__set__(self, value)
        self.home = value.home


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do by the CPU what was asked of the device; what comes back is on it, unless a copy home was asked."""
    leaves = tree_leaves((args, kwargs))
    _check(func, args, [t for t in leaves if isinstance(t, Tensor)])
    asked = kwargs.get("device")
    stays = torch.device(asked).type == NAME if asked else any(isinstance(t, OnDevice) for t in leaves)
    if stays and any(isinstance(g, torch.Generator) and g.device.type != NAME for g in leaves):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    at_home = {"device": "cpu"} if stays and asked else {}
    a, k = tree_map_only(OnDevice, lambda t: t.home, (args, kwargs | at_home))
    result = func(*a, **k)
    if stays:
        result = tree_map_only(Tensor, OnDevice, result)
    result = return_and_correct_aliasing(func, args, kwargs, result)
    if any(isinstance(t, OnDevice) and t.shape != t.home.shape for t in leaves):
        raise NotImplementedError(f"{NAME} cannot follow {func}, which has resized a tensor")
    return result


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise `RuntimeError` if tensors of the CPU are where a GPU's kernel would not have them."""
    name = func._schema.name.removeprefix("aten::")
    if name in COPIES or len({type(t) is OnDevice for t in tensors}) < 2:
        return
    if name in INDEXED:
        indices = [i for i in args[1] if i is not None]
        if type(args[0]) is not OnDevice and any(type(i) is OnDevice for i in indices):
            raise RuntimeError(f"indices should be on the same device as the indexed tensor (cpu): {name}")
        tensors, numbers = [args[0]], args[2:3]
    elif torch.Tag.pointwise in func.tags or name.startswith("_foreach"):
        numbers = [t for t in tensors if type(t) is not OnDevice]
        tensors = [t for t in tensors if type(t) is OnDevice]
    elif name in FILLED:
        *tensors, last = tensors
        numbers = [last]
    else:
        numbers = []
    tensors += [n for n in numbers if isinstance(n, Tensor) and n.ndim]
    if len({type(t) is OnDevice for t in tensors}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, found cpu and {NAME}: {name}")


def _halved(op: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(
            *tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args), **kwargs
        )
