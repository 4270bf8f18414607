"""Follows the tensors of a pass: what each comes from, and which of its dimensions holds the channels."""

import functools
import math
import re
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

# What functions do with their tensors, by their names; all others keep places and channels where they are.
FAMILIES = {
    "convolution": r"conv(_transpose)?[123]d",
    "addition": r"add_?|__i?r?add__",
    "largest": r"_?max_pool[123]d(_with_indices)?",
    "average": r"_?(avg|lp)_pool[123]d",
    "norm": r"(batch|group|instance)_norm",
    "mean": r"\w*mean|sum|a?max|a?min|median|std|var|norm|logsumexp|adaptive.*",
    "product": r"(bi)?linear|(__)?matmul(__)?|mm|bmm|einsum|addmm|baddbmm|tensordot",
    "move": r"permute|transpose|movedim|moveaxis|swapaxes|swapdims|adjoint|m?T|m?H",
    "shape": r"dim|size|numel|shape|ndim|dtype|device|is_\w+",
    "fresh": r"new_\w+|\w+_like",  # these read a shape, a dtype, a device: no numbers
    "cast": r"\w+_as",  # expand_as, type_as: so does their second tensor
}
OTHERS = vars(nn.Module()).keys() - {"_parameters", "_buffers"}  # what every module has, and no tensors
PLAIN = {bool, int, float, str, type(None)}
WEIGHTS, KERNEL = "on weights or constants", "on a kernel that the network computes"
PIXELS, VECTORS = "on single pixels of this example", "outside maps"
ALONE = "on a map without a batch dimension (give example=... of shape (N, C, ...))"
LAST = "on maps with channels last"
FORM = "on maps in another form than (N, C, ...)"
SHAPED = "on what has the shape of a map, but no places of the input"
REARRANGED = {ALONE, LAST, FORM}
MANY = 4  # kernels that one tensor is made of, to remember


class Origin(NamedTuple):
    """What is known of a tensor."""

    of_input: bool = True  # not computed from weights and constants alone
    channels: int | None = None  # the dimension that holds them, if known
    places: bool = False  # it holds those of a map, in any order; one only where a map shrank to it
    sources: frozenset[int] = frozenset()  # the events that it comes from directly
    kernel_of: frozenset[int] = frozenset()  # the events whose result it holds, in another form


CONSTANT = Origin(of_input=False)


class Origins:
    """The origins of all tensors of a pass, from the arguments and results of each function."""

    def __init__(self, constants: Collection[int], dimensions: Collection[int]) -> None:
        self._constants, self._dimensions = constants, dimensions
        self._shapes = set[tuple[int, ...]]()  # of the maps that went through one
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}  # by id, which another may get later
        self.kernels = set[int]()  # the events whose result became the weight of a convolution or a product

    def of(self, tensor: Any) -> Origin:
        """The origin of a tensor; what no function was seen to make, as the example, is taken for a map."""
        known = self._known.get(id(tensor))
        if known and known[0]() is tensor:
            return known[1]
        if id(tensor) in self._constants or not isinstance(tensor, Tensor):
            return CONSTANT
        is_map = tensor.ndim in self._dimensions and pixels(tensor.shape) > 1
        return Origin(True, 1 if is_map else None, is_map)

    def why_no_map(self, shape: tuple[int, ...], origin: Origin) -> str:
        """Why a tensor is no feature map (N, C, ...); empty if it is one."""
        if not origin.of_input:
            return WEIGHTS
        if not origin.places:
            alike = len(shape) in self._dimensions
            if not alike or pixels(shape) == 1:
                return PIXELS if alike else VECTORS
            if shape not in self._shapes or origin.channels not in (None, 1):
                return SHAPED
        if origin.channels == 0:
            return ALONE
        if len(shape) not in self._dimensions or (origin.channels is None and shape not in self._shapes):
            return FORM
        return LAST if origin.channels not in (None, 1) else ""

    def follow(self, call: "Call", result: Any) -> None:
        """Note where the result of a call comes from, and what the call has written into."""
        if call.name == "__setitem__":
            self._written(call.args[0], call.args[2])
            return
        results = [result] if isinstance(result, Tensor) else _tensors((result,))
        if not results:
            return
        given = call.given()
        origins = [*map(self.of, given)]
        if (call.family == "convolution" or call.func is F.linear) and len(given) > 1:
            self.kernels |= origins[1].kernel_of
        if call.family == "convolution":
            self._shapes |= {tuple(given[0].shape), tuple(results[0].shape)}
        for tensor in results:
            self.put(tensor, _combined(call, given, origins, tensor))

    def put(self, tensor: Tensor, origin: Origin) -> None:
        """Note an origin, for a view also that of the tensor it shows."""
        self._known[id(tensor)] = weakref.ref(tensor), origin
        base = tensor._base if origin.of_input and tensor._is_view() else None
        if base is not None and not (old := self.of(base)).of_input:
            self._known[id(base)] = weakref.ref(base), old._replace(of_input=True, places=origin.places)

    def _written(self, target: Tensor, value: Any) -> None:
        for source in map(self.of, _tensors((value,))):
            old = self.of(target)
            new = source if not old.of_input else old._replace(sources=old.sources | source.sources)
            self.put(target, new._replace(channels=new.channels if old.channels is None else old.channels))


def constants_of(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the tensors that modules hold."""
    return {*map(id, _tensors(v for m in modules for k, v in vars(m).items() if k not in OTHERS))}


class Call(NamedTuple):
    """A call of a function."""

    name: str
    family: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self) -> list[Tensor]:
        """The tensors whose numbers it reads."""
        if self.family == "fresh":
            return []
        tensors = [*_tensors(self.args), *_tensors(self.kwargs.values())]
        return tensors[:1] if self.family == "cast" else tensors


@functools.cache
def family(name: str) -> str:
    """The family of a function, by its name; empty for any other."""
    return next((f for f, names in FAMILIES.items() if re.fullmatch(names, name)), "")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, results or attributes, and in containers of them."""
    found = list[Tensor]()
    for value in values:
        if type(value) in PLAIN:  # most are
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)) and value:
            found += _tensors(value.values() if isinstance(value, dict) else value)
    return found


def _combined(call: Call, given: list[Tensor], origins: list[Origin], result: Tensor) -> Origin:
    parts = [o for o in origins if o.of_input]
    if not parts:
        return CONSTANT
    first = origins[0]
    same = not call.family or (call.family == "norm" and first.channels is not None)
    if same and len(parts) == 1 and first.places and given[0].shape == result.shape:
        return first
    sources, kernel_of = parts[0].sources, parts[0].kernel_of
    for part in parts[1:]:
        sources, kernel_of = sources | part.sources, kernel_of | part.kernel_of
    if call.family in ("convolution", "product", "average", "mean"):
        kernel_of = frozenset()
    channels = _channels(call, given, origins, result)
    places = _places(call, given, origins, channels, result)
    return Origin(True, channels, places, sources, kernel_of)


def made_by(event: int, origin: Origin, activated: bool) -> Origin:
    """The origin of what an event returns; `activated`: which may become a kernel."""
    of_input, channels, places, _, kernel_of = origin
    sources = frozenset({event})
    if activated:
        kernel_of = kernel_of | sources if len(kernel_of) < MANY else sources
    return Origin(of_input, channels, places, sources, kernel_of)


def pixels(shape: Iterable[int]) -> int:
    """The number of places of a map with channels in its second dimension."""
    return math.prod(tuple(shape)[2:])


def _places(
    call: Call, given: list[Tensor], origins: list[Origin], channels: int | None, result: Tensor
) -> bool:
    """Whether the result still holds the places of a map: not after a mean over them or a dense layer."""
    several, first = pixels(result.shape) > 1, origins[0]
    if call.family == "convolution":
        return several or (first.places and channels == 1)
    if call.family in ("average", "largest"):
        return several
    if call.family == "mean":  # not over the batch
        alike = channels is not None and result.shape[:1] == given[0].shape[:1]
        return alike and first.places and result.numel() > result.shape[0] * result.shape[channels or 0]
    if call.func is F.linear and given[0].ndim == 2:
        return False
    if call.family == "product":
        return any(o.places for o in origins) and (several or call.func is F.linear)
    if channels is None and not several and result.ndim > 3:  # a sum over places, in the form of a map
        return False
    return any(o.places for o in origins) or (several and channels == 1 and result.ndim > 3)


def _channels(call: Call, given: list[Tensor], origins: list[Origin], result: Tensor) -> int | None:
    """The dimension of the result that holds the channels."""
    if call.family == "convolution":
        return 1 if result.ndim == given[1].ndim else 0  # a map alone, without a batch
    first = origins[0].channels
    if first is None and result.ndim > 3 and call.family in ("average", "largest", "norm"):
        return 1
    if call.func is F.linear:
        return result.ndim - 1 if first is None else first
    if call.family == "product":
        return None
    if call.family == "move":
        return None if first is None else _moved(call, given[0].ndim, first)
    if call.family == "mean" and result.shape[:1] != given[0].shape[:1]:  # over the batch
        return None
    alike = [
        (t.shape == result.shape, o.channels)
        for t, o in zip(given, origins, strict=True)
        if t.ndim == result.ndim and o.of_input and o.channels is not None
    ]
    if alike:
        return max(alike)[1]
    if first is None or given[0].ndim == result.ndim:
        return None
    return _viewed(given[0].shape, first, result.shape)


def _moved(call: Call, ndim: int, channels: int) -> int | None:
    """Where a permutation puts the channels: tried on a tensor whose sizes all differ."""
    with _disable_current_modes():  # what is done here is no call of the network
        sizes = torch.empty(tuple(range(1, ndim + 1)), device="meta")
        args = [sizes if isinstance(a, Tensor) else a for a in call.args]
        kwargs = {k: sizes if isinstance(a, Tensor) else a for k, a in call.kwargs.items()}
        try:
            return tuple(call.func(*args, **kwargs).shape).index(channels + 1)
        except (RuntimeError, ValueError, TypeError):
            return None


def _viewed(old: torch.Size, channels: int, new: torch.Size) -> int | None:
    """Where the channels are after a view, if all dimensions up to them stay, or all from them on."""
    if old[: channels + 1] == new[: channels + 1]:
        return channels
    place = channels + len(new) - len(old)
    return place if place >= 0 and old[channels:] == new[place:] else None
