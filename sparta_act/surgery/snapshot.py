"""What a forward pass, or our own edit, can change in a network, and how it is put back."""

import argparse
import dataclasses
import functools
import itertools
import operator
import random
import types
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS: tuple[type[Any], ...] = (OrderedDict, dict, list, deque, set, bytearray)  # subclasses first
BASES = {base: base for base in CONTAINERS}
RECORDS = types.SimpleNamespace, argparse.Namespace, UserDict, UserList
ATOMS = int, float, complex, str, bytes, type, types.FunctionType, types.ModuleType, type(None), torch.Size
EXACTLY = {*ATOMS, bool}  # most values are: this is faster than isinstance
PARTS = {  # the tensors that a sparse one is made of
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class Snapshot:
    """All that is within a network: attributes, containers, tensors with their memory, generators.

    It goes into modules that are not registered, and into objects whose classes come from the same packages
    as the network's. Out of reach are objects of other packages, and variables of classes and modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._steps: list[Callable[[], None]] = []
        self._last: list[Callable[[], None]] = []  # what needs the tensors to be in their places
        self._packages = {_package(type(m)) for m in model.modules()} - {"torch"}
        todo, self._seen = [model], dict[int, Any]()  # what has been seen is kept: an id is used once
        self._memory = set[int]()
        self._empty: list[Any] = []  # containers, as most of a module's are
        with torch._C.DisableTorchFunctionSubclass():
            while todo:
                value: Any = todo.pop()
                if type(value) in BASES and not value:
                    self._empty.append(value)
                elif id(value) not in self._seen:
                    self._seen[id(value)] = value
                    todo += [v for v in self._keep(value) if type(v) not in EXACTLY]

    def restore(self) -> None:
        """Put everything back, in place; Ctrl-C waits until it is done."""
        with torch._C.DisableTorchFunctionSubclass():
            put_back([self._clear, *self._steps, *self._last])

    def _clear(self) -> None:
        for value in self._empty:
            if value:
                value.clear()

    def _keep(self, value: Any) -> Iterable[Any]:
        """Note how to put the value back; what is inside it."""
        cls = type(value)  # the most frequent ones come first
        if cls is tuple:
            return value  # type: ignore[no-any-return]
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, nn.Module) and not isinstance(value, CONTAINERS):
            return self._keep_attributes(value)
        if isinstance(value, ATOMS):
            return ()
        if base := _container(cls):
            content = _listed(base, value)
            self._steps.append(functools.partial(_refill, base, value, content))
            return content if cls in BASES else [*content, *self._keep_attributes(value)]
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, types.MappingProxyType):
            return [*value.values()]
        if isinstance(value, np.ndarray) and not isinstance(value, np.memmap):
            self._last.append(functools.partial(_rewrite, value, value.copy()))
            return value.ravel().tolist() if value.dtype.hasobject else ()
        if state := _state_of(value):
            get, put = state
            self._steps.append(functools.partial(put, get()))
            return ()
        is_record = isinstance(value, RECORDS) or dataclasses.is_dataclass(value)
        if is_record or _package(cls) in self._packages:
            return self._keep_attributes(value)
        return ()

    def _keep_attributes(self, value: Any) -> Iterable[Any]:
        cls: Any = type(value)
        slots = in_slots(value)
        if _slots_of(cls):  # one that is empty may be filled
            self._steps.append(functools.partial(_refit, value, slots))
        own = getattr(value, "__dict__", None)
        if not isinstance(own, dict):
            return [*slots.values()]
        self._steps.append(functools.partial(_reattach, value, cls, dict(own)))
        return [*slots.values(), *own.values()]

    def _keep_tensor(self, tensor: Tensor) -> Iterable[Any]:
        inside = [*self._keep_attributes(tensor)]
        if tensor.is_leaf:
            self._last.append(functools.partial(_regrade, tensor, tensor.grad, tensor.requires_grad))
            inside += [tensor.grad] if tensor.grad is not None else []
        if (memory := memory_of(tensor)) is not None:
            self._steps.append(functools.partial(_rejoin, tensor, tensor.data, _layout(tensor)))
            place = tensor.untyped_storage()._cdata
            if place not in self._memory:
                self._memory.add(place)
                self._last.append(functools.partial(_overwrite, memory, memory.clone()))
        elif parts := PARTS.get(tensor.layout):
            backup = tensor.detach().clone()
            self._last.append(functools.partial(_recopy, tensor, backup, tensor._version))
            inside += [getattr(tensor, part)() for part in parts]
        return inside


def in_slots(value: Any) -> dict[str, Any]:
    """The attributes that its class and its bases keep in `__slots__`."""
    cls: Any = type(value)
    return {name: getattr(value, name) for name in _slots_of(cls) if hasattr(value, name)}


@functools.lru_cache(maxsize=1024)
def _slots_of(cls: Any) -> list[str]:
    slotted, kind = [vars(c) for c in cls.__mro__ if "__slots__" in vars(c)], types.MemberDescriptorType
    return [name for own in slotted for name, member in own.items() if isinstance(member, kind)]


def _refit(value: Any, slots: dict[str, Any]) -> None:
    for name, content in slots.items():
        object.__setattr__(value, name, content)  # its class may be frozen
    for name in in_slots(value).keys() - slots:
        object.__delattr__(value, name)


def put_back(steps: list[Callable[[], None]]) -> None:
    """Take all steps, whatever fails or interrupts one of them, then say so."""
    problem: BaseException | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            problem = problem or error
        except BaseException as interruption:
            problem = interruption
            step()
    if problem:
        raise problem


def of_structure(module: nn.Module) -> list[Callable[[], None]]:
    """What puts back the class, the attributes and the children of a module."""
    children = module._modules
    base = OrderedDict if isinstance(children, OrderedDict) else dict  # by the version of torch
    refill = functools.partial(_refill, base, children, _listed(base, children))
    return [functools.partial(_reattach, module, type(module), dict(vars(module))), refill]


def memory_of(tensor: Tensor) -> Tensor | None:
    """The bytes of the storage that the tensor is in, as another tensor on it; None if there are none."""
    try:
        storage = tensor.untyped_storage()
        if tensor.is_meta or not storage.nbytes() or not storage.data_ptr():
            return None
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    except Exception:  # sparse, or made of other tensors
        return None


def _container(cls: type) -> type[Any] | None:
    return BASES.get(cls) or next((base for base in CONTAINERS if issubclass(cls, base)), None)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _state_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to read and to set the state of a generator of random numbers."""
    if isinstance(value, torch.Generator) and value is not torch.default_generator:
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _listed(base: type[Any], value: Any) -> list[Any]:
    """What a container holds; of a dict, each key and then its value."""
    if issubclass(base, dict):
        return [*itertools.chain.from_iterable(base.items(value))]
    return [*base.__iter__(value)]


def _refill(base: type[Any], value: Any, content: list[Any]) -> None:
    now = _listed(base, value)
    if len(now) == len(content) and all(map(operator.is_, now, content)):
        return  # what is equal may be another object, or may not be compared
    base.clear(value)  # the methods of the base: Counter.update would add
    if issubclass(base, dict):
        for key, item in zip(content[::2], content[1::2], strict=True):
            base.__setitem__(value, key, item)
    else:
        (base.update if base is set else base.extend)(value, content)


def _reattach(value: Any, cls: type, attributes: dict[str, Any]) -> None:
    if type(value) is not cls:
        object.__setattr__(value, "__class__", cls)  # past its own __setattr__
    own = vars(value)
    own.update(attributes)
    for name in own.keys() - attributes.keys():
        del own[name]


def _rewrite(array: Any, content: Any) -> None:
    if array.shape == content.shape and array.flags.writeable:
        array[...] = content


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    if tensor.is_nested:
        return tensor.dtype, storage
    return tensor.dtype, storage, tensor.shape, tensor.stride(), tensor.storage_offset()


def _rejoin(tensor: Tensor, alias: Tensor, layout: tuple[Any, ...]) -> None:
    """Give the tensor its dtype, shape and storage back."""
    if _layout(tensor) != layout:
        tensor.data = alias


def _overwrite(memory: Tensor, content: Tensor) -> None:
    storage = memory.untyped_storage()
    if storage.nbytes() != content.numel():
        storage.resize_(content.numel())
    if not torch.equal(memory, content):
        memory.copy_(content)


def _recopy(tensor: Tensor, backup: Tensor, version: int) -> None:
    if tensor._version != version or tensor.layout is torch.sparse_coo:
        with torch.no_grad():
            tensor.copy_(backup)  # its data would be another tensor, with other indices


def _regrade(tensor: Tensor, grad: Tensor | None, required: bool) -> None:
    if tensor.requires_grad != required:
        tensor.requires_grad_(required)
    if tensor.grad is not grad:
        tensor.grad = grad
