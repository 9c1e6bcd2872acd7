"""AdamW and its learning rate, as in the paper, §3.3."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(
    model: nn.Module,
    lr: float = 6e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW whose weight decay spares norm gains and biases: everything with one dimension."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(
    step: int,
    steps: int,
    lr: float = 6e-4,
    warmup_steps: int = 2000,
    decay_fraction: float = 0.9,
    min_lr_ratio: float = 0.1,
    linear: bool = False,
) -> float:
    """The learning rate of step `step`, 0 being the first of `steps`.

    Up in a line over `warmup_steps` steps to `lr`, then down a cosine (or `linear`) that reaches
    min_lr_ratio * lr at step decay_fraction * steps, and constant from there.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    end = decay_fraction * steps
    progress = min(1.0, (step - warmup_steps) / (end - warmup_steps)) if end > warmup_steps else 1.0
    left = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * left)
