"""Where a model is: from what a user names to the folder or hub repository that is loaded."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CHECKPOINTS = "checkpoints"  # in a run's output, a folder for each
# One of these is in every folder that transformers loads; an adapter's names its base model.
CONFIGS = ("config.json", "adapter_config.json")


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((output / CHECKPOINTS).glob("step-*"))


def locate(name: str | Path, subfolder: str = "") -> str | Path:
    """The checkpoint that `name` stands for.

    name: a folder with a config.json, in `subfolder` if that is given, and a hub repository
        (owner/name) stand for themselves; the output of a training run for its newest checkpoint.
    Raises ValueError for anything else, of which transformers would ask the hub, or, of a folder
    without a config.json, make a model of the released shape.
    """
    folder = Path(name)
    if not folder.is_dir():
        if HUB_ID.fullmatch(str(name)):
            return name
        raise ValueError(f"{str(name)!r} is neither a directory nor a hub repository (owner/name)")
    if any((folder / subfolder / config).is_file() for config in CONFIGS):
        return name
    for newest in reversed(checkpoints(folder)):
        return newest
    inside = sorted(folder.glob("*/config.json"))
    raise ValueError(
        f"{folder / subfolder} holds no model: neither a config.json nor the checkpoints of a run"
        + (f"; there is one in {inside[0].parent}" if inside else "")
    )
