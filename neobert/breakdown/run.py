"""`neobert bench --profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neobert.breakdown.cases import cases
from neobert.breakdown.measure import measure_roof, take_apart
from neobert.breakdown.report import as_json, draw, markdown, write
from neobert.config import NeoBERTConfig

REPEATS = {"cpu": 3, "cuda": 10}


def run(
    device: str, dtype: str, folder: Path, plot: bool, quick: bool, say: Callable[[str], None]
) -> Path:
    """Takes every case apart, says each table, writes the results file and returns its path.

    quick: 4 layers in place of the model's 28.
    """
    at, low = torch.device(device), getattr(torch, dtype)
    config = NeoBERTConfig(num_hidden_layers=4 if quick else 28)
    roof = measure_roof(at, low)
    say(
        f"roofline: {roof.flop_rate / 1e12:,.3f} TFLOP/s by the fastest matrix product, "
        f"{roof.copy_rate / 1e9:,.1f} GB/s by copying\n"
    )
    figures: dict[str, Any] = {}
    for what, tokens, step in cases(config, at, low):
        breakdown = take_apart(step, tokens, at, REPEATS[at.type])
        figures[what] = as_json(breakdown, roof)
        say(markdown(f"{what}, {dtype}", breakdown, roof) + "\n")
    path, document = write(folder, device, dtype, config.num_hidden_layers, roof, figures)
    if plot:
        draw(document, path.with_suffix(".png"))
    return path
