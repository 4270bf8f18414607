"""What each process of test_distributed does: a few steps in float64, which leave rounding no room."""

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

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
    state = model.state_dict(), trainer.final().state_dict()
    checkpoint, images = Path(sys.argv[1]).with_suffix(".epoch"), (255 * x).to(torch.uint8)

    def after_batch() -> None:
        if trainer.seen == 15 and distributed.is_first():
            trainer.save(checkpoint, {})

    with tqdm(disable=True) as bar:  # one epoch, and again from the middle of it
        epochs = [trainer.run_epoch(images, y, bar, after_batch)]
        trainer.load(checkpoint, {})
        epochs.append(trainer.run_epoch(images, y, bar))
    if distributed.is_first():
        torch.save([totals, *state, epochs], sys.argv[1])
