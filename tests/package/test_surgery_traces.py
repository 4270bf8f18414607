"""What a look or an edit leaves behind: nothing, in memory, containers, random numbers, and after Ctrl-C."""

import abc
import collections
import copy
import dataclasses
import random
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparta_act.activations import Sparta, SwishReLU
from sparta_act.errors import SiteError
from sparta_act.surgery.replacing import relu_sites, replace_relus, restore_relus
from tests.helpers import nets
from tests.package.test_surgery import Probe, assert_untouched, state

X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))


class Layers(nn.Module):
    """A block of one convolution; a subclass adds to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nets.conv3(4, 4), nn.BatchNorm2d(4)
        self.more()

    def more(self):
        pass

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


def net_of(block):
    return nn.Sequential(nets.conv3(3, 4), nn.Sequential(block(), block()), nn.Flatten())


# Who sees what an in-place ReLU has changed.


class KeepsAttribute(Layers):
    def forward(self, x):
        self.feature = h = self.norm(self.conv(x)) + x
        return F.relu_(h)


class KeepsAView(Layers):
    def forward(self, x):
        h = self.norm(self.conv(x)) + x
        self.state = {"maps": [h[:, 1:3, 2:]]}
        return h.relu_()


class ReadsAView(Layers):
    def forward(self, x):
        h = self.norm(self.conv(x)) + x
        rest = h[:, 2:, ::2]
        return F.relu_(h) + 0 * rest.mean()


class ReadsByAnOperator(Layers):
    def forward(self, x):
        h = self.norm(self.conv(x)) + x
        y = F.relu(h, inplace=True)
        return torch.ops.aten.add(y, h)


class ReadsItsInput(Layers):
    def forward(self, x):
        return self.conv(F.relu_(x)) + x


class ReturnsBoth(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nets.conv3(3, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.conv(x)
        return types.SimpleNamespace(before=h, after=self.act(h))


@pytest.mark.parametrize(
    ("make", "site", "problem"),
    [
        (lambda: net_of(KeepsAttribute), "G1.B2", "that the attribute 'feature' of 1.1 keeps"),
        (lambda: net_of(KeepsAView), "G1.B1", "that the attribute 'state' of 1.0 keeps"),
        (
            lambda: net_of(ReadsAView),
            "G1.B2",
            "G1.B2: a forward uses what an in-place activation has changed",
        ),
        (lambda: net_of(ReadsByAnOperator), "1.1", "uses what an in-place activation has changed"),
        (lambda: net_of(ReadsItsInput), "1.0", "uses what an in-place activation has changed"),
        (ReturnsBoth, "act", "that the output of the network keeps"),
        (lambda: nn.Sequential(nn.ReLU(True), nets.conv3(3, 4)), "0", "as its input, keeps"),
    ],
)
def test_who_still_sees_what_an_in_place_relu_has_changed(make, site, problem):
    net = make()
    before = state(net)
    with pytest.raises(SiteError, match=problem):
        replace_relus(net, site, Probe, example=X)
    assert_untouched(net, before)


@pytest.mark.parametrize("example", [torch.zeros(1, 3, 5, 5), torch.full((2, 3, 5, 5), float("nan"))])
@pytest.mark.parametrize(
    ("block", "problem"),
    [(KeepsAView, "that the attribute 'state'"), (ReadsByAnOperator, "forward uses what")],
)
def test_and_where_all_numbers_are_alike(block, problem, example):
    with pytest.raises(SiteError, match=problem):
        replace_relus(net_of(block), "G1.B1", Probe, example=example)


@pytest.mark.parametrize("keep", [lambda y: y, lambda y: y[:, 1:], lambda y: [y.detach()]])
def test_what_a_forward_hook_keeps(keep):
    net, kept = net_of(Layers), []
    net[1][1] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    hook = net[1][1][0].register_forward_hook(lambda module, inputs, output: kept.append(keep(output)))
    with pytest.raises(SiteError, match="that a forward hook, or another variable outside, keeps"):
        replace_relus(net, "1.1.1", Probe)
    hook.remove()
    hook = net[1][1][0].register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
    replace_relus(net, "1.1.1", Probe)


class ReadsTheOtherHalf(Layers):
    def forward(self, x):
        h = self.norm(self.conv(x)) + x
        return torch.cat([F.relu_(h[:, ::2]), h[:, 1::2]], 1)


class RestsInAList(Layers):
    """Holds only what is not changed afterwards, and a cycle."""

    def forward(self, x):
        h = [self.norm(self.conv(x)) + x]
        h.append(h)
        self.kept = F.relu(h[0], inplace=True)
        return self.kept


@pytest.mark.parametrize("block", [ReadsTheOtherHalf, RestsInAList])
def test_an_in_place_relu_that_nobody_sees_is_replaced(block):
    net, x = net_of(block), torch.rand(2, 3, 8, 8)
    before = net(x)
    replace_relus(net, "G1.B*", lambda channels: nn.ReLU(), example=X)
    assert torch.equal(net(x), before)


FACTORS = collections.defaultdict(lambda: 1.0)


class Asks(Layers):
    """Chooses by its class, behind a norm that is zero."""

    def more(self):
        nn.init.zeros_(self.norm.weight)
        FACTORS[Asks] = 2.0

    def forward(self, x):
        me = self
        return F.relu(self.norm(self.conv(x)) * FACTORS[me.__class__] + x)


def test_what_a_zero_hides_is_compared_by_the_calls():
    with pytest.raises(SiteError, match="asks for its own class or modules"):
        replace_relus(net_of(Asks), "G1.B2", Probe)


@pytest.mark.parametrize(
    ("block", "refused"), [(lambda: Reads(), True), (Layers, False)], ids=["read again", "not read"]
)
def test_a_new_activation_that_changes_its_input(block, refused):
    net = net_of(block)
    if refused:
        with pytest.raises(SiteError, match="make the new activation with inplace=False"):
            replace_relus(net, "G1.B1", lambda channels: nn.SiLU(inplace=True))
    else:
        replace_relus(net, "G1.B1", lambda channels: nn.SiLU(inplace=True))


class Reads(Layers):
    def forward(self, x):
        h = self.norm(self.conv(x)) + x
        return F.relu(h) - 0.5 * h


# What a forward changes.


class Tally(list):
    count = 0


class ModuleAndDict(nn.Module, dict):
    __hash__, __eq__ = object.__hash__, object.__eq__
    count = 0

    def __init__(self):
        nn.Module.__init__(self)


@dataclasses.dataclass
class Meter:
    count: int = 0
    values: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slotted:
    count: int = 0
    tensor: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))
    later: int = dataclasses.field(init=False)


def fill_slots(meter):
    meter.count, meter.later = meter.count + 1, 3
    meter.tensor += 1


def of_slots(meter):
    return meter.count, meter.tensor.tolist(), hasattr(meter, "later")


class EmptySlot:
    __slots__ = ("later",)


class OneSlot:
    __slots__ = "image"

    def __init__(self, image):
        self.image = image


class Own:
    count = 0


def bump(meter):
    meter.count += 1


def add(meter):
    meter.values.append(meter.count)


def double_(module):
    module.double().float()
    module.to(memory_format=torch.channels_last)
    module.double()


CHANGES = {
    "deque": (lambda: collections.deque([0, 1], maxlen=2), lambda v: v.append(5), list),
    "counter": (lambda: collections.Counter("ab"), lambda v: v.update("b"), dict),
    "defaultdict": (lambda: collections.defaultdict(list), lambda v: v["a"].append(1), dict),
    "attribute of a list": (Tally, bump, lambda v: v.count),
    "attribute of a module that is a dict": (ModuleAndDict, bump, lambda v: v.count),
    "ordered": (lambda: collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), list),
    "nested": (lambda: {"a": [{"b": {1}}]}, lambda v: v["a"][0]["b"].add(2), repr),
    "in a tuple": (lambda: ([], {}), lambda v: v[0].append(1), repr),
    "subclass": (Tally, lambda v: v.append(1), list),
    "bytes": (lambda: bytearray(b"ab"), lambda v: v.extend(b"c"), bytes),
    "array": (lambda: np.arange(3.0), lambda v: v.__imul__(2), list),
    "namespace": (lambda: types.SimpleNamespace(n=0), lambda v: setattr(v, "n", v.n + 1), repr),
    "dataclass": (Meter, bump, repr),
    "list in a dataclass": (Meter, add, repr),
    "slots": (Slotted, fill_slots, of_slots),
    "empty slot": (EmptySlot, lambda v: setattr(v, "later", 1), lambda v: hasattr(v, "later")),
    "own object": (Own, bump, lambda v: v.count),
    "user dict": (collections.UserDict, lambda v: v.update(a=1), dict),
    "tensors in a list": (lambda: [torch.zeros(2)], lambda v: v[0].add_(1), lambda v: v[0].sum().item()),
    "hidden module": (lambda: [nn.BatchNorm2d(3)], lambda v: v[0](X), lambda v: v[0].running_mean.tolist()),
    "dtype": (lambda: nn.Linear(2, 1), lambda v: v.double(), lambda v: v.weight.dtype),
    "layout": (lambda: nn.Conv2d(2, 2, 3), double_, lambda v: (v.weight.dtype, v.weight.stride())),
    "storage": (
        lambda: nn.Linear(2, 1),
        lambda v: setattr(v.weight, "data", v.weight.data.clone()),
        lambda v: v.weight.data_ptr(),
    ),
    "by data": (lambda: nn.Linear(2, 1), lambda v: v.weight.data.add_(1), lambda v: v.weight.tolist()),
    "nothing equal": (
        lambda: torch.full((2,), float("nan")),
        lambda v: v.__setitem__(0, 1.0),
        lambda v: str(v.tolist()),
    ),
    "view": (lambda: torch.zeros(1).expand(3), lambda v: v.data[:1].add_(1), lambda v: v.tolist()),
    "sparse": (
        lambda: torch.eye(2).to_sparse(),
        lambda v: v.add_(torch.ones(2, 2).to_sparse()),
        lambda v: v.to_dense().tolist(),
    ),
    "sparse values": (
        lambda: torch.eye(2).to_sparse_csr(),
        lambda v: v.values().mul_(3),
        lambda v: v.to_dense().tolist(),
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8),
        lambda v: v.copy_(torch.zeros(3)),
        lambda v: v.dequantize().tolist(),
    ),
    "generator": (
        lambda: torch.Generator(),
        lambda v: torch.rand(2, generator=v),
        lambda v: v.get_state().sum(),
    ),
    "numpy generator": (
        lambda: np.random.default_rng(3),
        lambda v: v.random(),
        lambda v: v.bit_generator.state["state"]["state"],
    ),
    "python generator": (lambda: random.Random(4), lambda v: v.random(), lambda v: v.getstate()),
    "attribute of a parameter": (
        lambda: nn.Linear(2, 1),
        lambda v: setattr(v.weight, "steps", getattr(v.weight, "steps", 0) + 1),
        lambda v: getattr(v.weight, "steps", 0),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_forward_changes_is_put_back(kind):
    make, change, look = CHANGES[kind]

    class Changing(Layers):
        def more(self):
            self.value = make()

        def forward(self, x):
            with torch.no_grad():
                change(self.value)
            return F.relu(self.norm(self.conv(x)) + x)

    net = net_of(Changing)
    value = net[1][1].value
    before = copy.deepcopy(look(value))
    relu_sites(net, example=X)
    assert net[1][1].value is value
    assert look(value) == before
    with pytest.raises(SiteError):
        replace_relus(net, "G1.B1", lambda channels: nn.MaxPool2d(2), example=X)
    assert look(value) == before


class Opaque(torch.Tensor):
    """Nothing that compares or copies works on it, as on some quantized tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.equal, torch.Tensor.equal, torch.Tensor.copy_, torch.Tensor.clone):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(4).as_subclass(Opaque),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.ones(2).to_mkldnn(),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
    ],
)
def test_tensors_on_which_little_works(make):
    net = net_of(Layers)
    net[1][0].odd = make()
    before = state(net)
    assert [s.label for s in relu_sites(net)] == ["G1.B1", "G1.B2"]
    assert_untouched(net, before)
    replace_relus(net, "G1.B1", Probe)
    restore_relus(net)
    assert_untouched(net, before)


# Random numbers.


class Noisy(Layers):
    """Draws in the ways that there are."""

    def forward(self, x):
        h = F.dropout(self.norm(self.conv(x)), 0.3, True) + torch.randn_like(x) + torch.rand(4, 1, 1)
        h = F.dropout2d(h, 0.2, True) * h.new_empty(4, 1, 1).bernoulli_(0.9) + torch.randint(3, (1, 4, 1, 1))
        order = torch.randperm(4)
        return F.relu(h[:, order] + x + torch.normal(0.0, 1.0, (4, 1, 1)))


def test_the_numbers_of_the_process_stay_and_passes_are_compared():
    net = net_of(Noisy)
    before = state(net)
    relu_sites(net)
    assert_untouched(net, before)
    replace_relus(net, "G1.B*", Probe)
    restore_relus(net)
    assert_untouched(net, before)


def test_a_late_refusal_winds_back_and_a_success_draws_as_always():
    torch.manual_seed(11)
    expected = Sparta(4).state_dict()
    net = net_of(Noisy)
    before = state(net)
    with pytest.raises(SiteError, match="must keep the shape"):
        replace_relus(net, "G1.B1", lambda channels: nn.Sequential(Sparta(channels), nn.MaxPool2d(3)))
    assert_untouched(net, before)
    torch.manual_seed(11)
    replace_relus(net, "G1.B1", Sparta)
    for name, value in net[1][0].sparta.state_dict().items():
        assert torch.equal(value, expected[name])


DRAWS = {
    "torch": lambda: torch.randint(0, 2**62, ()).item(),
    "numpy": lambda: np.random.randint(0, 2**62),  # noqa: NPY002
    "python": lambda: random.getrandbits(62),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("block", [Layers, Noisy])
def test_no_number_of_another_thread_comes_twice(draw, block):
    net, drawn, stop = net_of(block), [], threading.Event()

    def keep_drawing():
        while not stop.wait(1e-4):
            drawn.append(draw())

    def late_probe(channels):
        while len(drawn) < 20:
            time.sleep(1e-3)
        return Probe(channels)

    thread = threading.Thread(target=keep_drawing)
    thread.start()
    try:
        replace_relus(net, "G1.B1", late_probe, example=X)
    finally:
        stop.set()
        thread.join()
    assert len({*drawn}) == len(drawn)


def test_networks_that_draw_are_edited_in_several_threads():
    networks, errors = [net_of(Noisy) for _ in range(3)], []

    def edit(network):
        try:
            replace_relus(network, "G1.B*", Probe, example=X)
        except SiteError as error:
            errors.append(error)

    threads = [threading.Thread(target=edit, args=(network,)) for network in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# Ctrl-C.


def interrupted(action, line):
    """Whether the action was interrupted, at that line of the surgery by count."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if "surgery" not in frame.f_code.co_filename or "test" in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def classes(net):
    return [(name, id(module), type(module), [*vars(module)]) for name, module in net.named_modules()]


@pytest.mark.parametrize("block", [nets.OneModule, nets.TwoModules])
def test_restoring_is_interrupted_at_every_line(block):
    net = nn.Sequential(nets.conv3(3, 4), nn.Sequential(block(4, 4, 1), block(4, 4, 1)))
    first = classes(net)
    replace_relus(net, "G1.B*", Probe, example=X)
    before, line = classes(net), 1
    while interrupted(lambda: restore_relus(net), line):
        assert classes(net) == before
        line += 1
    assert line > 50
    assert classes(net) == first


@pytest.mark.parametrize("action", [relu_sites, lambda net: replace_relus(net, "G1.B1", Probe, example=X)])
def test_a_look_and_an_edit_are_interrupted_at_many_lines(action):
    net = nn.Sequential(nets.conv3(3, 4), nn.Sequential(nets.OneModule(4, 4, 1)))
    before, line = state(net), 1
    while interrupted(lambda: action(net), line):
        assert_untouched(net, before)
        line = line * 5 // 3 + 13
    assert line > 1000


# Registers of subclasses.

REGISTER = {}


class Meta(type):
    def __init__(cls, name, bases, space):
        super().__init__(name, bases, space)
        REGISTER[name] = cls


class Registers(abc.ABC):  # noqa: B024
    def __init_subclass__(cls, **options):
        REGISTER[cls.__name__] = cls


class OfAnABC(Layers, Registers):
    def forward(self, x):
        return F.relu(self.conv(x) + x)


class OfAMeta(Layers, metaclass=Meta):
    def forward(self, x):
        return F.relu(self.conv(x) + x)


@pytest.mark.parametrize("block", [OfAnABC, OfAMeta])
def test_registers_by_a_metaclass_are_left_alone(block):
    net = net_of(block)
    replace_relus(net, "G1.B1", Probe)
    assert REGISTER[block.__name__] is block
    assert isinstance(net[1][0], block)
    assert isinstance(copy.deepcopy(net)[1][0].sparta, Probe)
    assert type(restore_relus(net)[1][0]) is block


# Precision.


class HalfThenFloat(Layers):
    def more(self):
        self.conv.half()

    def forward(self, x):
        return F.relu(self.norm(self.conv(x.half()).float()) + x)


class FloatThenHalf(Layers):
    def more(self):
        self.conv.to(torch.bfloat16)

    def forward(self, x):
        return F.relu(self.conv(self.norm(x.float()).to(torch.bfloat16)) + x.to(torch.bfloat16)).float()


class Autocast(Layers):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.relu(self.conv(x)) + x


class Doubles(Layers):
    def forward(self, x):
        return F.relu((self.norm(self.conv(x)) + x).double()).float()


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (HalfThenFloat, torch.float32),
        (FloatThenHalf, torch.bfloat16),
        (Autocast, torch.float32),
        (Doubles, torch.float64),
    ],
)
def test_the_new_module_has_the_dtype_of_its_input(block, dtype):
    net = net_of(block).eval()
    replace_relus(net, "1.0", Probe)
    assert net[1][0].sparta.slope.dtype is dtype
    net(X)


# Examples and outputs.


class Batch(nn.Module):
    """Takes images by name, changes what it is given, and returns an object."""

    def __init__(self):
        super().__init__()
        self.net = net_of(Layers)

    def forward(self, images, scale=None):
        images = images[0] if isinstance(images, list) else images
        images.add_(1)
        return types.SimpleNamespace(logits=collections.UserDict(a=[self.net(images)]))


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding."""


@dataclasses.dataclass(frozen=True)
class Record:
    pixels: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"images": x},
        lambda x: collections.OrderedDict(images=x),
        lambda x: types.MappingProxyType({"images": x, "scale": 2}),
        lambda x: Encoding(images=x),
        lambda x: Encoding(images=[x]),
        lambda x: (x,),
        lambda x: [x],
        lambda x: ([x], {"a": Encoding(b=x)}),
        lambda x: (x, Record(x)),
        lambda x: (x, OneSlot(x)),
        lambda x: x.requires_grad_(),
    ],
)
def test_examples_of_many_kinds(wrap):
    x = X.clone()
    net = Batch()
    assert len(relu_sites(net, example=wrap(x))) == 2
    replace_relus(net, "G1.B1", Probe, example=wrap(x))
    assert torch.equal(x, X)
    assert x.grad is None


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ([], "there is no tensor in this list"),
        (3, "example must be a tensor, a tuple of several arguments or a mapping .* no tensor in this int"),
        (X.numpy(), r"no tensor in this ndarray; pass torch.as_tensor\(example\)"),
        ({0: X}, r"the keys of this one are no names: for one argument, pass \(example,\)"),
        (X[:0], "the example is empty"),
        (X.to("meta"), "a meta tensor, which has no values"),
    ],
)
def test_examples_that_are_refused(example, problem):
    for look in (relu_sites, lambda *a, **k: replace_relus(*a, "G1.B1", Probe, **k)):
        with pytest.raises(SiteError, match=problem):
            look(net_of(Layers), example=example)


# Activations.


def hooked(channels):
    module = SwishReLU()
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


@pytest.mark.parametrize(
    "activation",
    [
        lambda channels: torch.compile(SwishReLU(), backend="eager"),
        lambda channels: torch.compile(nn.ReLU(), backend="eager"),
        lambda channels: nn.DataParallel(SwishReLU()),
        lambda channels: nn.Sequential(torch.compile(Probe(channels), backend="eager"), nn.Dropout()),
        hooked,
        lambda channels: torch.fx.symbolic_trace(SwishReLU()),
    ],
)
@pytest.mark.parametrize("make", [lambda: net_of(Layers), lambda: nn.Sequential(nets.conv3(3, 4), nn.ReLU())])
def test_wrapped_activations(activation, make):
    net = make().eval()
    y = net(X)
    site = "G1.B1" if len(net) > 2 else "1"
    replace_relus(net, site, activation)
    restore_relus(net)
    assert torch.equal(net(X), y)


# Time.


def lines_of(action):
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace if "verifying" in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def test_checking_takes_as_long_as_there_are_blocks():
    few, many = (
        nn.Sequential(nets.conv3(3, 4), nn.Sequential(*(Layers() for _ in range(n)))) for n in (3, 12)
    )
    lines = [lines_of(lambda net=net: replace_relus(net, "G1.B*", Probe, example=X)) for net in (few, many)]
    assert lines[1] < 4.5 * lines[0]


def test_a_network_that_draws_nothing_is_looked_at_twice_for_each_example():
    net, passes = nets.Net(nets.OneModule), []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    relu_sites(net)  # without an example of one's own: ours is drawn, and is no number of the network's
    assert len(passes) in (2, 4)
    passes.clear()
    relu_sites(nn.Sequential(net, nn.Dropout(0.1)))
    assert len(passes) > 10
