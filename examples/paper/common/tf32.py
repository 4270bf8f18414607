"""Float32 on a GPU: exact, or TF32, which is faster and rounds inputs to 10 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 is exact on every GPU; torch's settings are restored afterwards."""
    with _settings("highest", tf32=False):
        yield


@contextmanager
def tf32_convolutions() -> Iterator[None]:
    """Inside, convolutions may use TF32, torch's default; torch's settings are restored afterwards."""
    with _settings(torch.get_float32_matmul_precision(), tf32=True):
        yield


@contextmanager
def _settings(matmul: str, *, tf32: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    try:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = tf32
        cudnn.benchmark = False  # it pays for a fixed batch size; a restart attacks the remaining images
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]
