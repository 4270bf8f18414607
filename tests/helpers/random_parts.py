"""What stands around the calls of ReLU: in a block, around it, and around a stage."""

from tests.helpers.random_calls import read_parts

# "fixed": no module of its own; "after": only after the last ReLU of the block.
PARTS = read_parts("""
# squeeze by convolution
@ self.down, self.up = conv(C, 2, 1), conv(2, C, 1)
h = h * torch.sigmoid(self.up(RELU(self.down(mean(h)))))
# squeeze by Linear
@ self.ld, self.le = nn.Linear(C, 2), nn.Linear(2, C)
w = mean(h).movedim(1, -1)
h = h * torch.sigmoid(self.le(RELU(self.ld(w)))).movedim(-1, 1)
# squeeze, flat
@ self.fd, self.fe = nn.Linear(C, 2), nn.Linear(2, C)
w = torch.sigmoid(self.fe(RELU(self.fd(mean(h).flatten(1)))))
h = h * w.view(*w.shape, *[1] * (h.ndim - 2))
# Linear with channels last
@ self.lin = nn.Linear(C, C)
h = h + 0.5 * self.lin(h.movedim(1, -1)).movedim(-1, 1)
# MLP with channels last
@ self.m1, self.m2 = nn.Linear(C, 6), nn.Linear(6, C)
h = h + 0.5 * self.m2(RELU(self.m1(h.movedim(1, -1)))).movedim(-1, 1)
# ReLU on weights
@ c = conv(C, C)
@ self.apply_conv, self.weight = getattr(F, f'conv{c.weight.ndim - 2}d'), c.weight
h = h + 0.3 * self.apply_conv(h, RELU(self.weight), padding=1)
# parametrized weights
@ self.pconv = torch.nn.utils.parametrize.register_parametrization(conv(C, C), 'weight', Positive())
h = h + 0.3 * self.pconv(h)
# ReLU on a scale
@ self.scale = nn.Parameter(torch.randn(C,))
h = h * (0.5 + RELU(self.scale).view(-1, *[1] * (h.ndim - 2)))
# ReLU on an embedding
@ self.embedding = nn.Parameter(torch.randn(1, *conv(C, C, 4).weight.shape[1:]))
h = h + F.interpolate(RELU(self.embedding), h.shape[2:])
# ReLU on a convolved embedding
@ self.econv = conv(C, C)
@ self.embedded = nn.Parameter(torch.randn(1, *conv(C, C, 4).weight.shape[1:]))
h = h + F.interpolate(RELU(self.econv(self.embedded)), h.shape[2:])
# ReLU on a buffer
@ self.register_buffer('window', torch.randn(1, *conv(C, C, 4).weight.shape[1:]))
h = h * (0.2 + F.interpolate(RELU(self.window), h.shape[2:]))
# ReLU on a grid
@ self.gconv = conv(1, C)
h = h + RELU(self.gconv(torch.linspace(-1, 1, h[0, 0].numel()).view_as(h[:1, :1])))
# ReLU on noise
h = h + 0.1 * RELU(torch.randn_like(h)) if self.training else h
# ReLU on a constant
h = h + RELU(torch.full_like(h, 0.1))
# ReLU on a predicted kernel | may
@ c = conv(C, C)
@ self.apply_kernel = getattr(F, f'conv{c.weight.ndim - 2}d')
@ self.predict = nn.Linear(C, c.weight[:, 0].numel())
k = self.predict(mean(h).flatten(1)).view(-1, 1, *[3] * (h.ndim - 2))
one = h.reshape(1, -1, *h.shape[2:])
h = h + 0.3 * self.apply_kernel(one, RELU(k), padding=1, groups=len(k)).reshape(h.shape)
# ReLU on attention scores | may
q = h.flatten(2).unflatten(1, (2, -1))
a = RELU(q.transpose(2, 3) @ q) / q[0, 0].numel()
h = h + (q @ a).reshape(h.shape)
# ReLU on a penalty
self.penalty = RELU(h.mean() - 0.1)
# ReLU on the batch | may
h = h + RELU(h.mean(0, keepdim=True) - 0.1)
# dropout
h = F.dropout(h, 0.3, self.training)
# shuffle
h = h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
# concatenation
@ self.fuse = conv(2 * C, C, 1)
h = self.fuse(torch.cat([h, h.roll(1, 1)], 1))
# GELU
h = F.gelu(h)
# ReLU where a flag says | refuse | fixed
if self.flag:
    h = RELU(h - 0.1)
# ReLU where a flag says, ternary | refuse | fixed
h = RELU(h - 0.1) if self.flag else h
# ReLU where a flag says, alias | refuse | fixed
late = F.relu
if self.flag:
    h = late(h - 0.1)
# ReLU where a flag says, alias of a module | refuse | fixed
@ self.late = nn.ReLU()
late = self.late
h = late(h - 0.1) if self.flag else h
# ReLU where a flag says, chosen | refuse | fixed
f = F.relu if self.flag else torch.tanh
h = f(h - 0.1)
# ReLU where a flag says, loop | refuse | fixed
for f in [F.relu] if self.flag else []:
    h = f(h - 0.1)
# ReLU where a flag says, inner function | refuse | fixed
def late(t):
    return RELU(t - 0.1)
if self.flag:
    h = late(h)
# ReLU where a flag says, or | refuse | fixed
h = h if not self.flag or RELU(h).sum() < 0 else RELU(h - 0.1)
# ReLU on large maps | refuse | fixed
if h.shape[-1] > 40:
    h = RELU(h - 0.1)
# leaves at random by a ReLU | refuse | fixed | after
if self.training and random.random() < 0.4:
    return RELU(h - 0.1)
# ReLU at random | refuse | fixed | after
if self.training and random.random() < 0.4:
    h = RELU(h - 0.1)
# ReLU in training | refuse | fixed | after
if self.training:
    h = RELU(h - 0.1)
# ReLU before a raise | may | fixed
if h.shape[1] > 999:
    raise ValueError(RELU(h).sum())
""")

UNITS = [
    "checkpointed(BLOCK)",
    "Around(BLOCK)",
    "Dropped(BLOCK)",
    "Gated(BLOCK, conv(C, C, 1))",
    "Squeezed(BLOCK, nn.Sequential(conv(C, 2, 1), nn.ReLU(), conv(2, C, 1)))",
    "Around(checkpointed(BLOCK))",
]

# How a network makes a stage of blocks, and how it runs it.
STAGES = {
    "Sequential": ("nn.Sequential({blocks})", "x = self.layer{g}(x)"),
    "ModuleList": ("nn.ModuleList([{blocks}])", "for block in self.layer{g}:\n    x = block(x)"),
    "reversed": ("nn.ModuleList([{blocks}])", "for block in reversed(self.layer{g}):\n    x = block(x)"),
    "ModuleDict": ("nn.ModuleDict(dict({keyed}))", "for block in self.layer{g}.values():\n    x = block(x)"),
    "attributes": ("Blocks({keyed})", "x = self.layer{g}(x)"),
    "convolution": (
        "Stage(nn.Sequential(conv({i}, {o}, 2, 2), norm({o})), {blocks})",
        "x = self.layer{g}(x)",
    ),
    "wrapped stage": ("Around(checkpointed(nn.Sequential({blocks})))", "x = self.layer{g}(x)"),
    "tree": ("Tree(conv({o}, {o}, 1), {keyed})", "x = self.layer{g}(x)"),
}
