"""Fine-tuning on one GLUE task, packed from the first step to the last score: the paper's App. C.

    output/config.yaml, metrics.jsonl      the settings; losses and scores by step
    output/inputs.json                     digests of the model's and the data's files
    output/checkpoints/step-…              while it runs: what it goes on from, the best weights too
    output/model/                          the best weights, as `from_pretrained` loads them
    output/result.json                     the scores; a run that has it is finished

Everything that happens in a run is in `finetune`, in the order in which it happens.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neobert.digests import check_same_inputs, checkpoint_digest, note_inputs
from neobert.engine import CONFIG, NonFiniteLossError, prepare, start_accelerator
from neobert.glue_data import LabelledBatch, data_digest, packed_batches, read_examples, tokenize
from neobert.glue_recipes import FinetuneConfig
from neobert.glue_tasks import Task, find_task, score, scores
from neobert.locate import CHECKPOINTS, checkpoints
from neobert.metrics import Metrics
from neobert.model import NeoBERTForSequenceClassification
from neobert.optim import adamw, learning_rate
from neobert.pretrain import keep_batches
from neobert.randomness import ORDER, random_generator
from neobert.saving import (
    load_optimizer,
    load_progress,
    save_checkpoint,
    write_json,
    write_whole,
)
from neobert.settings import check_same_run, save_config
from neobert.signals import stop_signals

INPUTS, RESULT, MODEL, BEST = "inputs.json", "result.json", "model", "best.safetensors"

# As in pre-training: of anything else a change would make it another run.
MAY_CHANGE = {"output", "evaluation", "max_tokens", "padded", "log_every", "save_every",
              "tensorboard"}  # fmt: skip


@dataclass
class EarlyStopping:
    """Follows a score, and tells when it has not improved for `patience` evaluations."""

    patience: int
    best: float | None = None
    best_step: int = 0
    since: int = 0

    def update(self, step: int, value: float) -> bool:
        """Whether this is the best score so far; of equal ones the first is."""
        if self.best is not None and not value > self.best:
            self.since += 1
            return False
        self.best, self.best_step, self.since = value, step, 0
        return True

    @property
    def exhausted(self) -> bool:
        return self.since >= self.patience


@dataclass
class FinetuneResult:
    """How a run ended.

    scores: each metric at the best evaluation, that of step `best_step`; score: their mean. All
        fractions of 1; None without an evaluation.
    step: the last one. stopped: "patience" or "epochs"; "signal" if it is to be continued;
        "non-finite loss", with the error, if it has no score.
    model: directory of the best weights. signum: the number of a signal that came.
    """

    task: str
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    step: int = 0
    stopped: str = ""
    seconds: float = 0.0
    model: str | None = None
    signum: int | None = None
    error: str | None = None


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Run it, or go on with it from the checkpoint in `config.output`; a finished one's result.

    Returns after the last epoch, when patience is at its end, or after saving when SIGTERM or
    SIGINT arrives. Raises ValueError and FileNotFoundError for settings, data or a model that do
    not fit, or that are others than a run here began with, SaveError if a checkpoint cannot be
    written and NonFiniteLossError.
    """
    # --- where the run goes on --------------------------------------------------------------------
    began = time.perf_counter()
    output, task = Path(config.output), find_task(config.task)
    if (output / CONFIG).exists():
        check_same_run(output / CONFIG, config, MAY_CHANGE)
    inputs = {"model": checkpoint_digest(config.checkpoint), "data": data_digest(config.data, task)}
    check_same_inputs(output / INPUTS, inputs)
    if (output / RESULT).exists():
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)  # if it was killed just before that
        return load_result(output)
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(
            f"fine-tuning runs in one process, not in {accelerator.num_processes}: its batches are "
            "small. Start an evaluation for each GPU, with tasks of its own"
        )
    resume_from = next(reversed(checkpoints(output)), None)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "stopping": {}, "scores": {}}
    if resume_from:
        progress = load_progress(resume_from)
    step = progress["step"]
    began -= progress["seconds"]
    torch.manual_seed(config.seed)

    # --- data and model ---------------------------------------------------------------------------
    examples = [read_examples(config.data, task, split) for split in task.splits]
    if resume_from:
        model = NeoBERTForSequenceClassification.from_pretrained(resume_from, dtype=torch.float32)
    else:
        model = load_model(config.checkpoint, task)
    tokenizer = AutoTokenizer.from_pretrained(resume_from or config.checkpoint)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{config.checkpoint} has a tokenizer of {len(tokenizer)} ids and a model of "
            f"{model.config.vocab_size}"
        )
    max_length = min(config.max_length, model.config.max_length)
    train, *dev = (tokenize(each, tokenizer, max_length) for each in examples)
    labels, *dev_labels = (each.labels for each in examples)
    dev_batches = [
        packed_batches(sequences, truth, range(len(truth)), config.max_tokens)
        for sequences, truth in zip(dev, dev_labels, strict=True)
    ]
    epoch_steps = math.ceil(len(train) / config.batch_size)
    steps = config.epochs * epoch_steps
    interval = config.evaluation_interval(epoch_steps)
    optimizer = adamw(
        model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay
    )
    model, optimizer = prepare(accelerator, model, optimizer)
    stopping = EarlyStopping(config.patience, **progress["stopping"])
    best: dict[str, Tensor] = {}
    if resume_from:
        load_optimizer(resume_from, accelerator, model, optimizer)
        best = load_file(resume_from / BEST)

    def write_best(folder: Path) -> None:
        save_file(best, folder / BEST)

    model.train()

    # --- what the run says ------------------------------------------------------------------------
    output.mkdir(parents=True, exist_ok=True)
    note_inputs(output / INPUTS, inputs)
    save_config(config, output / CONFIG)
    metrics = Metrics(task.name, output, step, steps, config.tensorboard)
    metrics.say(
        f"{task.name}: {len(train):,} examples, {epoch_steps:,} steps of {config.batch_size} an "
        f"epoch, an evaluation every {interval}; lr {config.lr:g}, weight decay "
        f"{config.weight_decay:g}, from {config.checkpoint}"
    )
    for each in examples:
        if each.left_out:
            metrics.say(
                f"{len(each.left_out):,} rows of {each.source} do not have its columns and are "
                f"left out: {'; '.join(each.left_out[:3])}{'; …' * (len(each.left_out) > 3)}"
            )
    result = FinetuneResult(task.name)
    epoch = -1
    with stop_signals() as stop:
        while step < steps and not stopping.exhausted:
            # --- one step: forward and backward ---------------------------------------------------
            if epoch != step // epoch_steps:
                epoch = step // epoch_steps
                order = random_generator(config.seed, ORDER, epoch).permutation(len(train))
            first = step % epoch_steps * config.batch_size
            chosen = order[first : first + config.batch_size].tolist()
            batches = packed_batches(train, labels, chosen, config.max_tokens)
            lr = learning_rate(
                step, steps, config.lr, math.ceil(config.warmup_fraction * steps),
                config.decay_fraction, config.min_lr_ratio, linear=True,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=accelerator.device)
            for batch in batches:
                # Each is a mean over its own examples, and they are unlike in number.
                part = forward(model, batch, config).loss * (len(batch.indices) / len(chosen))
                accelerator.backward(part)
                loss += part.detach()

            # --- one step: the update -------------------------------------------------------------
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            # The only place where a step waits for the device.
            loss_value, norm_value = torch.stack([loss, norm]).tolist()
            if not math.isfinite(loss_value) or not math.isfinite(norm_value):
                metrics.close()
                kept = keep_batches(output, step, 0, batches)
                raise NonFiniteLossError(
                    f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; its batches "
                    f"are in {kept}"
                )
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # --- what came of it ------------------------------------------------------------------
            metrics.advance(loss_value)
            if step % config.log_every == 0 or step == steps:
                metrics.write(
                    step, loss=loss_value, gradient_norm=norm_value, learning_rate=lr,
                    seconds=time.perf_counter() - began,
                )  # fmt: skip
            if step % interval == 0 or step == steps:
                outputs = [predict(model, each, config) for each in dev_batches]
                found = scores(task, dev_labels, outputs)
                metrics.write(step, **found, seconds=time.perf_counter() - began)
                if stopping.update(step, score(found)):
                    progress["scores"] = found
                    best = {
                        name: tensor.to("cpu", copy=True)
                        for name, tensor in model.state_dict().items()
                    }
            to_go_on = step < steps and not stopping.exhausted
            if to_go_on and (stop.requested or step % config.save_every == 0):
                progress["stopping"] = {
                    name: value for name, value in vars(stopping).items() if name != "patience"
                }
                progress["seconds"] = time.perf_counter() - began
                save_checkpoint(
                    output, step, accelerator, model, optimizer, tokenizer, progress, keep=1,
                    write_more=write_best,
                )  # fmt: skip
            if to_go_on and stop.requested:
                result.stopped = "signal"
                break

    # --- the end ----------------------------------------------------------------------------------
    metrics.close()
    result.step = step
    result.score, result.scores = stopping.best, progress["scores"]
    result.best_step = stopping.best_step
    result.seconds = time.perf_counter() - began
    if result.stopped != "signal":
        result.stopped = "patience" if stopping.exhausted else "epochs"
        result.model = str(output / MODEL)
        write_whole(output / MODEL, lambda folder: save_model(folder, model, best, tokenizer))
        write_json(output / RESULT, asdict(result))
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    result.signum = stop.signum
    return result


def forward(model: Any, batch: LabelledBatch, config: FinetuneConfig) -> Any:
    """Loss and logits; bfloat16 is autocast here, as in pre-training."""
    device = next(model.parameters()).device
    moved = batch.to(device)
    inputs = moved.padded_inputs(model.config.pad_token_id) if config.padded else moved.inputs()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return model(**inputs)


@torch.no_grad()
def predict(model: Any, batches: list[LabelledBatch], config: FinetuneConfig) -> np.ndarray:
    """(examples, num_labels) float32 logits of batches that hold all examples of a set."""
    model.eval()
    logits = torch.cat([forward(model, batch, config).logits.float() for batch in batches])
    model.train()
    outputs = np.empty(logits.shape, np.float32)
    outputs[[index for batch in batches for index in batch.indices]] = logits.cpu().numpy()
    return outputs


def load_model(path: str | Path, task: Task) -> NeoBERTForSequenceClassification:
    """A checkpoint in float32 with a new last layer for the task. The layer before it is taken from
    a fine-tuned checkpoint, as from MNLI's, and new elsewhere."""
    names = task.classes or ("score",)
    loaded: Any = NeoBERTForSequenceClassification.from_pretrained(
        path,
        dtype=torch.float32,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="single_label_classification" if task.classes else "regression",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, info = loaded
    others = [each for each in info["mismatched_keys"] if not each[0].startswith("classifier.")]
    if others:
        raise ValueError(f"{path}: tensors of another shape than its config.json says: {others}")
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, model.config.classifier_init_range)
        model.classifier.bias.zero_()
    return model


def save_model(
    folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def load_result(output: Path) -> FinetuneResult:
    """That of a finished run, whose folder may have been moved since."""
    result = FinetuneResult(**json.loads((output / RESULT).read_text()))
    return result if result.model is None else replace(result, model=str(output / MODEL))
