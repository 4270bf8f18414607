"""Slow reference of every formula, with loops, from the papers; `p` holds a module's parameters by name.

Letters and order of the steps follow the papers, and nothing is imported from the package. The two files
`test_activations.py` compare the fast forms with these.
"""

import math
from itertools import product

import torch


def conv(x, weight, padding=1):
    """Convolution, one output number at a time: (N, C, H, W), (D, C, K, K) -> (N, D, H', W')."""
    x = torch.nn.functional.pad(x, [padding] * 4)
    k = weight.shape[2]
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    y = [
        (x[n, :, i : i + k, j : j + k] * weight[d]).sum()
        for n, d, i, j in product(range(len(x)), range(len(weight)), range(height), range(width))
    ]
    return torch.stack(y).view(len(x), len(weight), height, width)


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def norm(x, p, name, training):
    """Batch norm of that name, if the module has one."""
    if f"{name}.weight" not in p:
        return x
    channels = []
    for c in range(x.shape[1]):
        mean, var = p[f"{name}.running_mean"][c], p[f"{name}.running_var"][c]
        if training:
            mean = x[:, c].mean()
            var = ((x[:, c] - mean) ** 2).mean()
        z = (x[:, c] - mean) / torch.sqrt(var + 1e-5)
        channels.append(z * p[f"{name}.weight"][c] + p[f"{name}.bias"][c])
    return torch.stack(channels, 1)


def pool(x):
    """Average over the bins of a 3 x 3 grid: bin i of a length L is floor(i L / 3) to ceil((i + 1) L / 3)."""

    def bins(length):
        return [slice(i * length // 3, math.ceil((i + 1) * length / 3)) for i in range(3)]

    means = [x[:, :, a, b].mean((2, 3)) for a in bins(x.shape[2]) for b in bins(x.shape[3])]
    return torch.stack(means, 2).view(*x.shape[:2], 3, 3)


def neighborhood_means(x, n):
    """X averaged over N x N neighbors; at the lower and right edge over those that exist."""
    rows, columns = math.ceil(x.shape[2] / n), math.ceil(x.shape[3] / n)
    means = [
        x[:, :, i * n : (i + 1) * n, j * n : (j + 1) * n].mean((2, 3))
        for i, j in product(range(rows), range(columns))
    ]
    return torch.stack(means, 2).view(*x.shape[:2], rows, columns)


def normalized(t):
    """Of one image: (t - mean) / sqrt(variance + 1e-5), the variance with n below it, not n - 1."""
    mean = sum(t.flatten()) / t.numel()
    variance = sum((v - mean) ** 2 for v in t.flatten()) / t.numel()
    return (t - mean) / torch.sqrt(variance + 1e-5)


def phi_c(x, p):
    """CANet on X averaged to 3 x 3: conv1, ReLU, conv2 without padding: (N, C, 1, 1)."""
    return conv(relu(conv(pool(x), p["conv1"])), p["conv2"], padding=0)


def phi_d(x, p):
    """DPNet: the kernel of each sample, conv6 of X averaged to 3 x 3: (N, 3, 3)."""
    return conv(pool(x), p["conv6"])[:, 0] if "conv6" in p else p["conv5"][0].expand(len(x), 3, 3)


def phi_s(x, p, kernels, training=False):
    """SANet: conv3, ReLU, conv4, then conv5 of each sample with its own kernel: (N, 1, H, W)."""
    h = relu(norm(conv(x, p["conv3"]), p, "norm3", training))
    m = norm(conv(h, p["conv4"]), p, "norm4", training)
    return torch.cat([conv(m[n : n + 1], kernels[n][None, None]) for n in range(len(x))])


def scores(x, p, n=1):
    """Both scores, each normalized over one image: s (N, 1, H / n, W / n) and c (N, C, 1, 1)."""
    z = neighborhood_means(x, n)
    s = torch.stack([normalized(t) for t in phi_s(z, p, phi_d(z, p))])
    return s, torch.stack([p["gain"][0] * normalized(t) for t in phi_c(z, p)])


def gated(x, s, c, n=1, scale=1):
    """Eq. 8, doubled with `identity`; with Eq. 6 every p looks its score up at floor(p / N)."""
    y = [
        relu(x[b, d, i, j]) * scale * sigmoid(s[b, 0, i // n, j // n] * c[b, d, 0, 0])
        for b, d, i, j in product(*map(range, x.shape))
    ]
    return torch.stack(y).view(x.shape)


def sparta(x, p, n=1, scale=1):
    """SPARTA: `scale` is 2 with `identity`."""
    return gated(x, *scores(x, p, n), n, scale)


def as_read(x, p, training=False, dynamic=True):
    """`AsRead` of the laboratory, and `Normed` if p has its batch norms."""
    w = _by_convolution(p)
    c = conv(relu(norm(conv(x, w["conv1"]), p, "norm1", training)), w["conv2"]).mean((2, 3), keepdim=True)
    kernels = pool(conv(x, w["conv6"])).mean(1) if dynamic else w["conv6"][0].expand(len(x), 3, 3)
    return gated(x, phi_s(x, w, kernels, training), c)


def pooled(x, p, training=False, dynamic=True):
    """`Pooled` of the laboratory, and `PooledNormed` if p has its batch norms."""
    w, three = _by_convolution(p), pool(x)
    c = conv(relu(norm(conv(three, w["conv1"]), p, "norm1", training)), w["conv2"], padding=0)
    kernels = conv(three, w["conv6"]).mean(1) if dynamic else w["conv6"][0].expand(len(x), 3, 3)
    return gated(x, phi_s(x, w, kernels, training), c)


def _by_convolution(p):
    return p | {name.removesuffix(".weight"): p[name] for name in p if name.startswith("conv")}


def swish_relu(x):
    return torch.stack([relu(v) * sigmoid(v) for v in x.flatten()]).view(x.shape)


def hyper_network(x, p):
    """Pool, fc to C / 4, ReLU, fc, 2 sigmoid - 1, one row per sample."""
    h = relu(x.mean((2, 3)) @ p["squeeze.weight"].T + p["squeeze.bias"])
    return 2 * sigmoid(h @ p["excite.weight"].T + p["excite.bias"]) - 1


def dynamic_relu_b(x, p, pi=None):
    """DY-ReLU-B; with pi (N, H, W) every coefficient is multiplied by it at its position: DY-ReLU-C."""
    theta = hyper_network(x, p).view(len(x), 4, x.shape[1])
    y = []
    for n, c, i, j in product(*map(range, x.shape)):
        a1, a2, b1, b2 = theta[n, :, c]
        share = 1 if pi is None else pi[n, i, j]
        first = share * (1 + a1) * x[n, c, i, j] + share * 0.5 * b1
        second = share * a2 * x[n, c, i, j] + share * 0.5 * b2
        y.append(torch.maximum(first, second))
    return torch.stack(y).view(x.shape)


def dynamic_relu_c(x, p):
    z = conv(x, p["position.weight"], padding=0)[:, 0]  # (N, H, W)
    gamma, tau = x.shape[2] * x.shape[3] / 3, 10
    pi = []
    for n in range(len(x)):
        e = torch.exp(z[n] / tau)
        pi.append(torch.minimum(gamma * e / e.sum(), torch.ones_like(e)))
    return dynamic_relu_b(x, p, torch.stack(pi))


def feature_denoising(x, p, training=False):
    """x + BN(1 x 1 conv(y)), y_i = sum_j f(x_i, x_j) x_j / sum_j f(x_i, x_j) over all positions j."""
    theta, phi = conv(x, p["theta.weight"], padding=0), conv(x, p["phi.weight"], padding=0)
    d = theta.shape[1]
    positions = list(product(range(x.shape[2]), range(x.shape[3])))
    y = []
    for n in range(len(x)):
        for a, b in positions:
            f = [torch.exp((theta[n, :, a, b] * phi[n, :, i, j]).sum() / math.sqrt(d)) for i, j in positions]
            mean = sum(w * x[n, :, i, j] for w, (i, j) in zip(f, positions, strict=True)) / sum(f)
            y.append(mean)
    y = torch.stack(y).view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return x + norm(conv(y, p["conv.weight"], padding=0), p, "norm", training)


def scatter(module, seed=0):
    """Fill the module with random numbers, in place, so that no term vanishes behind a 0 or a 1."""
    torch.manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            fan_in = max(1, tensor[0].numel())
            noise = torch.randn(tensor.shape) * (1.5 / math.sqrt(fan_in))
            tensor.data.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return module


def assert_same(module, twin, x):
    """`module(x)` and `twin(x, p)` agree in float64: values, gradient of x and of every parameter."""
    assert x.dtype == torch.float64
    x = x.clone().requires_grad_()
    p = dict(module.named_parameters()) | {k: v.clone() for k, v in module.named_buffers()}
    inputs = {"x": x} | dict(module.named_parameters())
    slow = twin(x, p)
    fast = module(x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    v = torch.linspace(-1, 1, fast.numel(), dtype=x.dtype).view(
        fast.shape
    )  # a different weight for each number
    fast, slow = (torch.autograd.grad((y * v).sum(), list(inputs.values())) for y in (fast, slow))
    for name, a, b in zip(inputs, fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
