"""One training on several processes of `torchrun`, each with its own device or core.

All processes draw the same random numbers for the whole batch and then work on their share of it, and batch
norm sees the whole batch: a training on one process or on eight learns the same, rounding aside.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes of `torchrun`, if it started this one; gives the device of this process.

    Raises `ValueError` if there are fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > here:
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes need a GPU each, and there are {here}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        dist.barrier()  # a process that leaves early would close the others' connection
    finally:
        gc.collect()  # a wrapped model that is still alive holds threads that abort Python's shutdown
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes that share the training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(x: Tensor) -> Tensor:
    """This process's part of a batch. Shapes: (N, *) -> (about N / processes, *)."""
    return x.tensor_split(processes())[dist.get_rank()] if dist.is_initialized() else x


def summed(x: Tensor) -> Tensor:
    """Sum of x over all processes, in place. Shapes: any, kept."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wrapped(model: nn.Module, device: str) -> nn.Module:
    """DistributedDataParallel around the model, or the model itself where one process works alone."""
    if not dist.is_initialized():
        return model
    ids = [torch.device(device).index] if device.startswith("cuda") else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)  # they are equal


def share_norms(model: nn.Module) -> nn.Module:
    """Change the batch norms of a model to use the whole batch, where several processes share it."""
    if not dist.is_initialized():
        return model
    if dist.get_backend() == "nccl":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
    return model


class _Sum(torch.autograd.Function):
    """Sum over all processes, in both directions: each one's part counts in every process's loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad.clone())


class SharedBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for the CPU, which torch's refuses. Shapes: (N, C, H, W), kept."""

    def forward(self, x: Tensor) -> Any:
        """Shapes: (N, C, H, W), kept."""
        if not self.training:
            return super().forward(x)
        n = summed(x.new_tensor(x.numel() / x.shape[1]))
        mean = _Sum.apply(x.sum((0, 2, 3))) / n
        centered = x - mean[:, None, None]
        variance = _Sum.apply((centered * centered).sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centered * scale[:, None, None] + self.bias[:, None, None]
