import random

import numpy as np
import pytest
import torch
from fixtures import tiny_data  # noqa: F401

import peers  # noqa: F401  (torchvision can be imported after it)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
