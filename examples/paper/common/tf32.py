"""What float32 means on a GPU: itself, or TF32, which is quicker and reads numbers to 10 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, float32 is float32 on every GPU; afterwards torch's settings are what they were."""
    with _settings("highest", tf32=False):
        yield


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Inside, convolutions may take TF32, as they do by torch's default; afterwards as before."""
    with _settings(torch.get_float32_matmul_precision(), tf32=True):
        yield


@contextmanager
def _settings(matmul: str, *, tf32: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    try:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = tf32
        cudnn.benchmark = False  # pays for one size of batch; a restart attacks as many images as still stand
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]
