"""Ways to call ReLU, and ways to call the last ReLU of a block.

A part is a few lines that work on the map `h`, of C channels; lines that begin with @ belong into `__init__`,
and those with % are methods. LAST(h) is a last ReLU of a block, RELU(h) another one, both in any spelling.
"""

from typing import NamedTuple

EDIT, MAY, REFUSE = range(3)  # the block can be edited, may be refused, must be refused


class Part(NamedTuple):
    """Some lines of a forward and what they need; or a call of ReLU on {}."""

    name: str
    lines: str
    init: str = ""
    methods: str = ""
    options: tuple[str, ...] = ()

    @property
    def truth(self) -> int:
        """What the part does to a block."""
        return REFUSE if "refuse" in self.options else MAY if "may" in self.options else EDIT


def read_parts(text: str) -> list[Part]:
    """The parts of a text, each after a line `# name | option | option`."""
    found = []
    for piece in text.strip().removeprefix("# ").split("\n# "):
        head, *lines = piece.splitlines()
        name, *options = head.split(" | ")
        init, methods = ("\n".join(x[2:] for x in lines if x[:2] == mark) for mark in ("@ ", "% "))
        own = "\n".join(x for x in lines if x[:2] not in ("@ ", "% "))
        found.append(Part(name, own or name, init, methods, tuple(options)))
    return found


# ReLU of {}. "limit": in a branch that no pass takes, it is not seen, as the docs say.
CALLS = read_parts("""
# F.relu({})
# torch.relu({})
# ({}).relu()
# F.relu(input={})
# F.relu({}, inplace=True) | in place
# F.relu_({}) | in place
# ({}).relu_() | in place
# activate({})
# nn.ReLU()({})
# getattr(F, "relu")({})
# torch.Tensor.relu({})
# partial(F.relu, inplace=False)({})
# F.relu({}, inplace=self.inplace)
@ self.inplace = INPLACE
# self.function({})
@ self.function = F.relu
# self.partial({})
@ self.partial = partial(F.relu, inplace=False)
# self.relu({})
@ self.relu = nn.ReLU(INPLACE)
# self.own({})
@ self.own = nn.ReLU(INPLACE)
# self.__hidden({})
@ self.__hidden = nn.ReLU(INPLACE)
# self.listed[1]({})
@ self.listed = nn.ModuleList([nn.GELU(), nn.ReLU(INPLACE)])
# self.keyed["b"]({})
@ self.keyed = nn.ModuleDict({"a": nn.GELU(), "b": nn.ReLU(INPLACE)})
# self.inside[1]({})
@ self.inside = nn.Sequential(nn.GELU(), nn.ReLU(INPLACE))
# getattr(self, "relu")({})
@ self.relu = nn.ReLU(INPLACE)
# self.act({})
@ self.relu = nn.ReLU(INPLACE)
% @property
% def act(self):
%     return self.relu
# F.relu(*[{}]) | may
# (lambda t: F.relu(t))({}) | may
# [F.relu(t) for t in ({},)][0] | may
# next(map(F.relu, [{}])) | may
# reduce(lambda t, f: f(t), [F.relu], {}) | may
# {"r": F.relu, "t": torch.tanh}["r"]({}) | may
# (F.relu if h.ndim else torch.tanh)({}) | may
# self.relu.forward({}) | may
@ self.relu = nn.ReLU(INPLACE)
# torch.utils.checkpoint.checkpoint(self.own, {}, use_reentrant=False) | may
@ self.own = nn.ReLU(INPLACE)
# outside({}) | may | limit
# self.final({}) | may | limit
% def final(self, t):
%     return F.relu(t)
# self.static({}) | may | limit
% @staticmethod
% def static(t):
%     return F.relu(t)
""")

# How the last ReLU is called. "fresh": what goes into it is a new tensor.
LASTS = read_parts("""
# plain
h = LAST(h)
# alias of a function
act = F.relu
h = «act(h)|h»
# alias of a module
@ self.relu = nn.ReLU(INPLACE)
act = self.relu
h = «act(h)|h»
# inner function | may
def last(t):
    return F.relu(t)
h = «last(h)|h»
# walrus
if (y := LAST(h)) is not None:
    h = y
# as an argument
h = torch.add(LAST(h), 0.1)
# over several lines
h = (
    «F.relu(
        h,  # é
    )|h»
    * 0.9
)
# in a tuple
h, _ = LAST(h), 0
# try
try:
    h = LAST(h)
finally:
    pass
# with
with torch.autograd.profiler.record_function("x"):
    h = LAST(h)
# after another | fresh
h = F.relu(h) - 0.1
h = LAST(h)
# two in one expression | fresh
h = F.relu(h) - LAST(-1.0 * h)
# within another | fresh
h = LAST(F.relu(h) - 0.1)
# its input is used after it | may
y = LAST(h)
h = h - y
# added to its input | may
h += LAST(h)
# indexed
h = LAST(h)[:, :]
# masked | may
h = LAST(h) * (h > -9)
# half of the channels | fresh
h = torch.cat([LAST(1.0 * h[:, :2]), h[:, 2:]], 1)
# Sequential
@ self.out = nn.Sequential(nn.Identity(), «nn.ReLU(INPLACE)|»)
h = self.out(h)
# twice in a Sequential | fresh
@ relu = nn.ReLU(INPLACE)
@ self.out = nn.Sequential(relu, conv(C, C, 1), «relu|»)
h = self.out(h)
# loop over modules | fresh
@ self.steps = nn.ModuleList([conv(C, C, 1), «nn.ReLU(INPLACE)|»])
for step in self.steps:
    h = step(h)
# loop | may
for _ in range(1):
    h = LAST(h)
# loop over functions | may
for f in (torch.tanh, «F.relu|=»):
    h = f(h)
# thrown away | may | in place
«F.relu_(h)|!h = self.spot(h)»
# either mode | may
h = LAST(h) if self.training else LAST(h)
# either mode, if | may
if self.training:
    h = LAST(h)
else:
    h = LAST(h)
# either flag | may
h = LAST(h) if self.flag else LAST(h)
# either size | may
h = LAST(h) if h.shape[-1] < 40 else LAST(h)
# flattened | may
h = «F.relu(h.flatten(2))|h.flatten(2)».reshape(h.shape)
# each image | may
h = torch.stack([«F.relu(t)|t[None]» for t in h]).reshape(h.shape)
# first image | may
h = torch.cat([«F.relu(h[0])|h[:1]».reshape(h[:1].shape), F.gelu(h[1:])])
# chosen pixels | may
h = h.masked_scatter(h > -9, «F.relu(h[h > -9])|h»)
# tokens | may
h = «F.relu(h.flatten(2).transpose(1, 2)).transpose(1, 2)|h.flatten(2)».reshape(h.shape)
# in groups | may
h = «F.relu(h.unflatten(1, (2, -1)))|h».reshape(h.shape)
""")
