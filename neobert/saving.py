"""Training checkpoints: a directory each, whole or not there.

    output/checkpoints/step-00001000/
        config.json, model.safetensors, tokenizer…   what `from_pretrained` loads
        optimizer.pt                                 AdamW's moments by parameter; random states
        progress.json                                the step, and where each lane's data goes on

A checkpoint is written aside, flushed to the disk and renamed: a kill at any moment leaves the one
before. The optimizer's state is one whole (2 GB for NeoBERT), whatever shards it had: a run
may go on with another number of processes, and from DDP to FSDP.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from neobert.config import NeoBERTConfig
from neobert.files import replace_file
from neobert.locate import CHECKPOINTS, checkpoints

OPTIMIZER, PROGRESS, DEEPSPEED = "optimizer.pt", "progress.json", "deepspeed"


class SaveError(OSError):
    """A checkpoint could not be written; the message says which one is the last good one."""


def save_checkpoint(
    output: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    progress: dict,
    keep: int,
    write_more: Callable[[Path], object] | None = None,
) -> Path:
    """Write step-`step` and remove all but the `keep` newest; every process calls it.

    model: as `accelerator.prepare` returned it. progress: anything JSON holds.
    write_more: writes other files into the folder that it is given.
    Raises SaveError, in every process, if writing fails, as on a full disk.
    """
    final = output / CHECKPOINTS / f"step-{step:08}"
    aside = final.with_name(f".{final.name}.unfinished")
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    random_states = _gather_random_states(accelerator)
    if deepspeed:
        weights = accelerator.get_state_dict(model)
    else:
        weights = get_model_state_dict(model, options=options)
        moments = get_optimizer_state_dict(model, optimizer, options=options)
    failure: Exception | None = None
    write = accelerator.is_main_process and not final.exists()
    if write:
        try:
            for left in (output / CHECKPOINTS).glob(".step-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
            accelerator.unwrap_model(model).save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            if not deepspeed:
                torch.save({"optimizer": moments, "random": random_states}, aside / OPTIMIZER)
            (aside / PROGRESS).write_text(json.dumps({**progress, "step": step}))
            if write_more is not None:
                write_more(aside)
        except Exception as error:  # whatever safetensors, torch or the system raise on a full disk
            failure = error
    if deepspeed:  # each process writes its own part
        accelerator.wait_for_everyone()
        engine: Any = model
        engine.save_checkpoint(str(aside), tag=DEEPSPEED)
        accelerator.wait_for_everyone()
    if write and failure is None:
        try:
            _flush(aside)
            os.rename(aside, final)
            _flush(final.parent)
            for old in checkpoints(output)[:-keep]:
                gone = old.with_name(f".{old.name}.removed")
                os.rename(old, gone)  # so that no half-removed one looks whole
                shutil.rmtree(gone, ignore_errors=True)
        except OSError as error:
            failure = error
    failed = torch.tensor(int(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum").item():
        shutil.rmtree(aside, ignore_errors=True)
        whole = checkpoints(output)
        raise SaveError(
            f"{final} could not be written ({failure or 'see the first process'}); "
            + (f"the last good checkpoint is {whole[-1]}" if whole else "there is none yet")
        ) from failure
    return final


def write_whole(final: Path, write: Callable[[Path], object]) -> None:
    """Make the directory `final`, in place of an older one, of what `write` puts in the directory
    it is given: whole, or not there. Raises SaveError if writing fails."""
    aside = final.with_name(f".{final.name}.unfinished")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        _flush(aside)
        _put_in_place(aside, final)
    except Exception as error:  # whatever safetensors, torch or the system raise on a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(f"{final} could not be written ({error})") from error


def write_json(path: Path, value: object) -> None:
    """Write a file whole, in place of an older one. Raises SaveError if writing fails."""
    try:
        replace_file(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise SaveError(f"{path} could not be written ({error})") from error


def export_model(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint without what only training needs; `folder` appears, or is replaced, whole.

    Raises SaveError if it cannot be written.
    """
    unwanted = shutil.ignore_patterns(OPTIMIZER, PROGRESS)
    try:
        write_whole(
            folder,
            lambda aside: shutil.copytree(checkpoint, aside, ignore=unwanted, dirs_exist_ok=True),
        )
    except SaveError as error:
        raise SaveError(f"{error}; the model is in {checkpoint}") from error


def load_optimizer(
    folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore what `save_checkpoint` wrote beside the weights and the progress.

    Random states only if there are as many processes as then. Nothing is unpickled but tensors,
    numbers and strings; DeepSpeed, whose state is in its own format, unpickles anything. Raises
    ValueError if the state is not of this engine.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not (folder / (DEEPSPEED if deepspeed else OPTIMIZER)).exists():
        raise ValueError(
            f"{folder} has no optimizer state "
            + ("of DeepSpeed" if deepspeed else "but DeepSpeed's")
            + ": go on with the engine that wrote it, or start_from it with its weights alone"
        )
    if deepspeed:
        engine: Any = model
        engine.load_checkpoint(str(folder), tag=DEEPSPEED)
        return
    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        model,
        optimizer,
        saved["optimizer"],
        options=StateDictOptions(full_state_dict=True, cpu_offload=True),
    )
    if len(saved["random"]) == accelerator.num_processes:
        cpu, cuda = saved["random"][accelerator.process_index]
        torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda, accelerator.device)


def has_optimizer(folder: str | Path) -> bool:
    """Whether a checkpoint holds an optimizer's state: a released one does not."""
    return any((Path(folder) / name).exists() for name in (OPTIMIZER, DEEPSPEED))


def load_progress(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROGRESS).read_text())


def check_shape(folder: str | Path, expected: NeoBERTConfig) -> None:
    """Raises ValueError, naming each difference, if a checkpoint is of another architecture."""
    found = NeoBERTConfig.from_pretrained(folder)
    if getattr(found, "model_type", None) != expected.model_type:
        raise ValueError(f"{folder} holds a {found.model_type} model, not {expected.model_type}")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "norm_eps")  # fmt: skip
    different = [
        f"{name} is {getattr(found, name)} there and {getattr(expected, name)} here"
        for name in names
        if getattr(found, name) != getattr(expected, name)
    ]
    if different:
        raise ValueError(f"{folder} is of another architecture: {'; '.join(different)}")


def _gather_random_states(accelerator: Accelerator) -> list:
    cuda = (
        torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None
    )
    mine = (torch.get_rng_state(), cuda)
    if accelerator.num_processes == 1:
        return [mine]
    everyone: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename a flushed directory to `final`, where an older one may be; no half-removed one looks
    whole."""
    old = final.with_name(f".{final.name}.removed")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(aside, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until everything in `folder`, and its name, is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
