import random

import numpy as np
import pytest
import torch

from benchmarks import peers  # noqa: F401  (torchvision can be imported after it)
from tests.helpers.fixtures import tables, tiny_data  # noqa: F401


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
