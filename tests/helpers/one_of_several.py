"""What each process of test_distributed does: a few steps in float64, which leave rounding no room."""

import dataclasses
import sys

import torch

from examples.paper.common.models import build
from examples.paper.training import distributed
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer

with distributed.joined("cpu") as device:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = build("resnet18", "sparta", "G*.B-1", width=8)
    recipe = dataclasses.replace(RECIPES["modern"], steps=2, clean_start=0.2, batch_size=15, averaging=0.5)
    trainer = Trainer(model, recipe, 45, device=device)
    trainer.model.train()
    x, y = torch.rand(35, 3, 32, 32), torch.randint(0, 10, (35,))
    totals = [distributed.summed(trainer.step(x[i], y[i])) for i in torch.arange(35).split(15)]
    if distributed.is_first():
        torch.save([totals, model.state_dict(), trainer.final().state_dict()], sys.argv[1])
