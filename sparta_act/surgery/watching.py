"""Watches a pass: its calls, and who still sees what an in-place activation has changed."""

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparta_act.surgery.randomness import OwnNumbers
from sparta_act.surgery.sandbox import tensors_in
from sparta_act.surgery.sites import Site

PLAIN = int, float, complex, str, torch.dtype


class Stand(NamedTuple):
    """A function that stands in for a new module in a pass."""

    site: Site
    module: nn.Module
    function: Callable[..., Any]
    is_new: bool  # what the new module computes, else what the network did there


class Changed(NamedTuple):
    """The input of an in-place function: it would have been changed, and is not."""

    by: Stand
    place: tuple[Any, ...]  # within the storage
    alive: Any  # a weak reference to it


class Watch(OwnNumbers):
    """Notes each call while it is `on`, and whether the input of an in-place function is used after it."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.calls: list[object] = []
        self.used: Stand | None = None  # whose input was
        self._changed: dict[int, Changed] = {}  # by their storages

    def of(self, stand: Stand) -> Callable[[Tensor], Any]:
        """Its function on a copy of its input, which is watched from then on if it would have changed."""

        def forward(x: Tensor) -> Any:
            self.on = False
            twin = _twin(x)
            self.on = True
            before = version(twin)
            y = stand.function(twin)
            in_place = y is twin if before is None else version(twin) != before
            if in_place and (place := _place(x)):
                storage = x.untyped_storage()
                self._changed[storage._cdata] = Changed(stand, place, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
            return y

        return forward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.on and getattr(func, "namespace", "") != "profiler":  # as of DataParallel
            self.calls.append((func, _described((*args, *kwargs.values()))))
            if self._changed and not self.used and not _is_view(func):
                self.used = next((c.by for t in tensors_in([args, kwargs]) if (c := self._seen_by(t))), None)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _seen_by(self, tensor: Tensor) -> Changed | None:
        """What has changed of the numbers of a tensor."""
        if (place := _place(tensor)) is None:
            return None
        changed = self._changed.get(tensor.untyped_storage()._cdata)
        return changed if changed and _overlap(changed.place, place) else None

    def kept(self) -> tuple[Stand, Tensor] | None:
        """A tensor that outlives the pass, with the function that would have changed it."""
        if any(not c.alive.expired() for c in self._changed.values()):
            gc.collect()  # what only cycles hold is gone
        if all(c.alive.expired() for c in self._changed.values()):
            return None
        objects = gc.get_objects()
        kinds = {kind for kind in {*map(type, objects)} if issubclass(kind, Tensor)}  # millions of few kinds
        tensors = [t for t in objects if type(t) in kinds]
        return next(((c.by, t) for t in tensors if (c := self._seen_by(t))), None)


def keeper(model: nn.Module, tensor: Tensor, given: object, returned: object) -> str:
    """Who keeps the tensor, in words."""
    storage = tensor.untyped_storage()._cdata

    def holds(values: object) -> bool:
        return any(_place(t) and t.untyped_storage()._cdata == storage for t in tensors_in(values))

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_modules") and holds(value):
                return f"the attribute {attribute!r} of {name or 'the network'}"
    if holds(given):
        return "whoever calls the network, as its input,"
    return "the output of the network" if holds(returned) else "a forward hook, or another variable outside,"


def _twin(x: Tensor) -> Tensor:
    """A copy with the same strides: on others, some functions take another way."""
    twin = x.clone()
    if x.layout is torch.strided and not x.is_nested and twin.stride() != x.stride() and 0 not in x.stride():
        twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return twin


def version(tensor: Tensor) -> int | None:
    """Another number after each change in place; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Which bytes of its storage a tensor occupies; None where it has none."""
    try:
        if not tensor.numel() or not tensor.untyped_storage().nbytes():
            return None
        return tensor.element_size(), tensor.storage_offset(), tensor.shape, tensor.stride()
    except Exception:  # sparse, nested, or made of other tensors
        return None


def _overlap(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    spans = []
    for size, first, shape, strides in (left, right):
        last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        spans.append((first * size, (last + 1) * size))
    start, end = min(spans)[0], max(s[1] for s in spans)
    if max(spans)[0] >= min(s[1] for s in spans):
        return False
    if left[0] != right[0]:
        return True
    taken = torch.zeros((end - start) // left[0], dtype=torch.bool, device="cpu")
    first, second = (
        taken.as_strided(shape, strides, offset - start // size)
        for size, offset, shape, strides in (left, right)
    )
    first.fill_(True)
    return bool(second.any())


def _is_view(func: Any) -> bool:
    """Whether a function reads no numbers, as slicing does: who reads its result is seen then."""
    aliases = [r.alias_info for r in func._schema.returns] if hasattr(func, "_schema") else []
    return any(alias and not alias.is_write for alias in aliases)


def _described(values: Iterable[Any]) -> list[Any]:
    """Shapes, types and numbers among the arguments of a call."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found += value.dtype, None if value.is_nested else value.shape
        elif isinstance(value, (list, tuple)):
            found.append(_described(value))
        elif isinstance(value, PLAIN):
            found.append(value)
    return found
