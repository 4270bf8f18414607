import random

import numpy as np
import pytest
import torch
from fixtures import tiny_data  # noqa: F401

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except (
    RuntimeError
):  # torchvision's own operators are missing beside a CPU build of torch; its models need none
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
