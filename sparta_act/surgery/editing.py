"""How to edit the network at a call, or why it cannot be edited."""

from collections.abc import Callable, Iterator
from inspect import getattr_static

from torch import Tensor, nn

from sparta_act.errors import SiteError
from sparta_act.surgery.branches import check_all_seen, check_block, runs_once
from sparta_act.surgery.network import Network
from sparta_act.surgery.recording import Event, Pass
from sparta_act.surgery.rewriting import MARK, NAME, Span, original_class
from sparta_act.surgery.sandbox import Like
from sparta_act.surgery.sites import Cut, Site

RELU_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

UNWRAP = (
    "undo what has put it there (accelerate: remove_hook_from_module(model, recurse=True)), then type "
    'for m in model.modules(): vars(m).pop("forward", None); replace the ReLUs, and wrap or compile again'
)

Seen = list[tuple[Pass, Event]]  # one call, in each pass it was seen in


def last_site(seen: Seen, network: Network, within: nn.Module, group: int = 0, block: int = 0) -> Site:
    """The site of the last call of a module or block, with its edit or the problem that prevents one."""
    event = seen[0][1]
    try:
        target, key, spans = _edit_of_last(seen, network)
        if group:
            check_block(
                network.forwards, event, within, "" if spans or target is not event.modules[-1] else key
            )
        _check_once(seen, network)
    except SiteError as error:
        name, calls = network.name(event.modules[-1]), _calls(seen, network)
        return Site(name, event.shape[1], calls, problem=str(error), group=group, block=block)
    name = ".".join(filter(None, (network.name(target), "" if spans else key)))
    return _site(seen, name, Cut(target, key, spans, within, *_what(seen)), group, block)


def one_site(seen: Seen, network: Network, keys: Iterator[str]) -> Site:
    """The site of one call, wherever in a forward; a rewritten one gets the next of the `keys`."""
    event = seen[0][1]
    owner = event.modules[-1]
    spans: tuple[Span, ...] = ()
    try:
        if event.key:  # of an nn.Sequential, whose forward cannot be rewritten
            _check_once(seen, network)
        swap = _swap(seen, network)
        if swap is None:
            _check_rewritable(seen)
            spans = network.spans(type(owner), {e.offset for _, e in seen})
        _check_once(seen, network)
        check_modes(seen, network)
        target, key = swap or (owner, next(keys))
    except SiteError as error:
        return Site(network.name(owner), event.shape[1], _calls(seen, network), problem=str(error))
    name = ".".join(filter(None, (network.name(target), key)))
    return _site(seen, name, Cut(target, key, spans, owner, *_what(seen)))


def has(owner: nn.Module, key: str) -> bool:
    """Whether a module has such an attribute; its own `__getattr__`, which may make one up, is not asked."""
    held = (vars(owner), owner._modules, owner._parameters, owner._buffers)
    return any(key in names for names in held) or getattr_static(type(owner), key, None) is not None


def _site(seen: Seen, name: str, cut: Cut, group: int = 0, block: int = 0) -> Site:
    edit = "rewrite" if cut.spans else "swap"
    return Site(name, seen[0][1].shape[1], 1, edit, "", group, block, cut)


def _what(seen: Seen) -> tuple[Like, dict[bool, Callable[[Tensor], Tensor]]]:
    """Device and dtype of the input, and what the call computes, by the modes it was seen in."""
    like = seen[0][1].like
    assert like is not None
    return like, {p.training: e.original for p, e in seen if e.original}


def _calls(seen: Seen, network: Network) -> int:
    return max(p.counts[seen[0][1].place] for p in network.passes)


def _check_once(seen: Seen, network: Network) -> None:
    if (calls := _calls(seen, network)) > 1:
        raise SiteError(f"it runs {calls} times in one pass; operate on a module that runs it once")


def check_modes(seen: Seen, network: Network) -> None:
    """Refuse a call that is not made in both modes, though its module runs: what it trains is not used."""
    owner = seen[0][1].modules[-1]
    modes = {p.training for p, _ in seen}
    if modes != {p.training for p in network.passes if id(owner) in p.inside}:
        mode = "training" if True in modes else "evaluation"
        raise SiteError(f"it is called in {mode} mode only, where the module runs in both; call it in both")


def _swap(seen: Seen, network: Network) -> tuple[nn.Module, str] | None:
    """The child to change where that changes these calls alone; None where a forward must be rewritten."""
    events = [event for _, event in seen]
    child, owner = network.child(events[0]), events[0].modules[-1]
    if any(network.child(e) != child or e.modules[-1] is not owner for e in events):
        raise SiteError("its last ReLU is called by another module in some passes than in others")
    last = {e.offset for e in events if e.offset >= 0}
    if child is None or not runs_once(network.forwards, *child, last):
        return None
    if any(getattr(events[0].act, hooks) for hooks in RELU_HOOKS):
        raise SiteError("its ReLU has hooks, which would go with it; remove them first")
    if "forward" in vars(events[0].act):
        raise SiteError(f"its ReLU has a forward of its own, which would go with it; {UNWRAP}")
    return child


def _check_rewritable(seen: Seen) -> None:
    owner = seen[0][1].modules[-1]
    if "forward" in vars(owner):
        raise SiteError(f"the module has a forward of its own, which hides that of its class; {UNWRAP}")
    for _, event in seen:
        if event.offset < 0:
            forward = f"{original_class(owner).__qualname__}.forward"
            raise SiteError(
                f"its ReLU is called in {event.via}, not in one expression of {forward}; write the call into "
                "that forward, or make it an nn.ReLU of its own"
            )


def _edit_of_last(seen: Seen, network: Network) -> tuple[nn.Module, str, tuple[Span, ...]]:
    """What to change: a child of a module (no spans), or calls in the forward of a module."""
    owner = seen[0][1].modules[-1]
    last = {e.offset for _, e in seen if e.offset >= 0}
    if swap := _swap(seen, network):
        check_all_seen(network.forwards, owner, last, swap[1] if swap[0] is owner else "")
        return *swap, ()
    _check_rewritable(seen)
    check_all_seen(network.forwards, owner, last, "")
    if MARK in vars(type(owner)):
        raise SiteError("an earlier call of its forward is replaced already; call restore_relus first")
    if has(owner, NAME):
        raise SiteError(f"the module has an attribute {NAME!r} already; give that another name")
    return owner, NAME, network.spans(type(owner), last)
