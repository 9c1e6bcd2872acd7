"""Settings of a run: a dataclass, changed by a YAML file and by "key=value" strings."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from neobert.files import replace_file

PRECISIONS = ("float32", "bfloat16")

Config = TypeVar("Config")


@dataclass
class TrainingSettings:
    """How a model is trained, on whatever it is. The defaults are those of the paper's
    pre-training (§3.3, App. A).

    steps, lr, warmup_steps, decay_fraction, min_lr_ratio: see `learning_rate`.
    beta1, beta2, eps, weight_decay: AdamW's; weight decay spares norm gains and biases.
    clip_norm: the largest norm of the gradient.
    precision: "float32", or "bfloat16": autocast, with float32 weights, optimizer and residual
        stream.
    gradient_checkpointing: recompute blocks in the backward pass. compile: torch.compile.
    log_every, save_every: steps. keep_checkpoints: how many of the newest are kept.
    tensorboard: whether metrics go there too; wandb: a Weights & Biases project they go to.
    push_to_hub: a repository, "owner/name", that every checkpoint is uploaded to.
    """

    steps: int = 1_000_000
    lr: float = 6e-4
    warmup_steps: int = 2000
    decay_fraction: float = 0.9
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False

    log_every: int = 10
    save_every: int = 5000
    keep_checkpoints: int = 3
    tensorboard: bool = True
    wandb: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self):
        one_of(self, PRECISIONS, "precision")
        at_least(self, 1, "steps", "log_every", "save_every", "keep_checkpoints")


def load(
    kind: type[Config],
    presets: Mapping[str, Callable[[], Config]],
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
) -> Config:
    """The preset (the defaults of `kind` if None), changed by a YAML file, then by the overrides.

    A key inside another is written model.hidden_size=512 or data.0.weight=0.5.
    Raises ValueError for a preset, key or value that does not exist or fit; of an unknown key it
    names the nearest.
    """
    if preset is not None and preset not in presets:
        raise ValueError(f"there is no preset {preset!r}{nearest(preset, presets)}")
    config: Any = OmegaConf.structured(presets[preset]() if preset else kind())
    try:
        if file is not None:
            config = OmegaConf.merge(config, OmegaConf.load(file))
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"{override!r} is not of the form key=value")
            OmegaConf.update(config, key, yaml.safe_load(value))
        return cast(Config, OmegaConf.to_object(config))
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = map(str, getattr(error.parent_node, "keys", list)())
        raise ValueError(f"there is no key {key!r}{nearest(key.split('.')[-1], known)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def assign(key: str, value: object) -> str:
    """The override that gives `key` this value, whatever characters its strings have."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # JSON is YAML


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def save_config(config: object, path: Path) -> None:
    """As a YAML file that `load` reads, whole: half of one would look like another run's."""
    replace_file(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_same_run(path: Path, config: Config, may_change: Collection[str]) -> None:
    """Raises ValueError if the run whose settings were saved at `path` was begun with others,
    those in `may_change` apart."""
    begun = vars(load(type(config), {}, file=path))
    changed = [
        f"{name} was {begun[name]!r} and is {value!r}"
        for name, value in vars(config).items()
        if name not in may_change and begun[name] != value
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with another configuration: {'; '.join(changed)}. Choose "
            "another output; start_from begins a new run from a checkpoint"
        )


def one_of(config: object, choices: Collection[str], *names: str) -> None:
    for name in names:
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}"
            )


def at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
