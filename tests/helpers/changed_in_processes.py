"""What each process of test_compatibility does; in float64, which leaves rounding no room."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel

from sparta_act import Sparta, SpartaError, SpartaSet, relu_sites, replace_relus, restore_relus
from tests.helpers import nets, reference

EDITS = [nets.OneModule, nets.TwoModules]  # a rewrite and a swap
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def changed(block, activation=Sparta, seed=0):
    """A network with other activations, in evaluation mode and float64, and random numbers everywhere."""
    net = reference.scatter(nets.Net(block), seed)
    del net.unused  # what gets no gradient
    replace_relus(net, "G*.B2", activation)
    for new in net.modules():
        if isinstance(new, Sparta):
            reference.scatter(new, seed)
    return net.double().eval()


def train(net, x, steps=3, run=None):
    """The gradients of the first of a few steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        (run or net)(x).square().mean().backward()
        first = first or {n: whole(p.grad).clone() for n, p in net.named_parameters()}
        optimizer.step()
    return first


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(net):
    return {n: whole(t).detach().clone() for n, t in net.state_dict().items()}


def data_parallel(block, x):
    net = changed(block, seed=dist.get_rank())  # the new modules get the first process's numbers too
    gradients = train(net, x, run=DistributedDataParallel(net, find_unused_parameters=False))
    return gradients, state(net)


def fully_sharded(block, x):
    net, mesh = changed(block), dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.layer1[1], net.layer2[1], net):
        fsdp.fully_shard(part, mesh=mesh)
    assert {type(p).__name__ for p in net.parameters()} == {"DTensor"}
    result = [train(net, x), state(net), net(x).detach()]
    untouched = nets.Net(block)
    fsdp.fully_shard(untouched.layer1[0], mesh=mesh)
    for operate in (relu_sites, restore_relus, lambda m: replace_relus(m, "G*.B1", nn.Hardtanh)):
        for model in (net, untouched):
            try:
                operate(model)
            except SpartaError as error:
                result.append(f"{type(error).__name__}: {error}")
    try:
        SpartaSet.of(net).save_pretrained("nowhere")
    except SpartaError as error:
        result.append(str(error))
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mine = IMAGES.chunk(dist.get_world_size())[dist.get_rank()]
    jobs = [data_parallel] + [fully_sharded] * hasattr(fsdp, "fully_shard")
    found = {job.__name__: [job(block, mine) for block in EDITS] for job in jobs}
    torch.save(found, f"{sys.argv[1]}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
