"""Masked-LM pre-training, from a laptop to a cluster: the paper's §3.2, §3.3 and Appendix A.

    neobert pretrain --preset tiny
    torchrun --nproc-per-node 8 -m neobert pretrain --preset neobert-1024 output=runs/stage-1
    accelerate launch --config_file configs/fsdp2.yaml -m neobert pretrain …

Data is packed, so that no step computes padding, and no sequence sees another. Everything that
happens in a run is in `pretrain`, in the order in which it happens.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neobert.corpus import open_texts, text_batches
from neobert.data import Corpus, MaskedBatch, TrainingStream
from neobert.engine import CONFIG, NonFiniteLossError, prepare, start_accelerator, whole
from neobert.fused import fuse_epilogues
from neobert.hub import HubPush
from neobert.locate import checkpoints, locate
from neobert.masking import Masking
from neobert.metrics import (
    PLOT,
    UNIGRAMS,
    Metrics,
    matmul_rate,
    plot_losses,
    training_flop,
    unigram_entropy,
)
from neobert.model import NeoBERTLMHead
from neobert.optim import adamw, learning_rate
from neobert.readers import Cut
from neobert.recipes import PretrainConfig
from neobert.saving import (
    check_shape,
    has_optimizer,
    load_optimizer,
    load_progress,
    save_checkpoint,
)
from neobert.settings import check_same_run, save_config
from neobert.shards import TokenShards, is_prepared
from neobert.signals import stop_signals
from neobert.wordpiece import train_tokenizer

TOKENIZER = "tokenizer"
TOKENIZER_TEXTS = 200_000  # that a tokenizer is trained on

# A run may go on with other values of these. Of anything else a change would make what follows
# another run than the one that began.
MAY_CHANGE = {"output", "micro_batch_bins", "padded", "precision", "gradient_checkpointing",
              "compile", "fused_epilogues", "validate_every", "log_every", "save_every",
              "keep_checkpoints", "tensorboard", "wandb", "push_to_hub", "steps",
              "tokenizer"}  # fmt: skip


@dataclass
class Result:
    """How a run ended: the last step, its loss, the last validation and the checkpoint there.

    stopped_by: the number of the signal that ended it early, if one did.
    """

    step: int
    loss: float
    validation: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    stopped_by: int | None = None


def pretrain(config: PretrainConfig) -> Result:
    """Run the job, or go on with it from the newest checkpoint in `config.output`.

    Returns when all steps are done, or after saving when SIGTERM or SIGINT arrives. Raises
    ValueError for a configuration, data or checkpoint that does not fit, SaveError if a checkpoint
    cannot be written and NonFiniteLossError.
    """
    # --- processes and devices --------------------------------------------------------------------
    began = time.perf_counter()
    output = Path(config.output)
    accelerator = start_accelerator()
    processes, rank = accelerator.num_processes, accelerator.process_index
    lanes = range(rank, config.batch_bins, processes)
    if config.batch_bins % (processes * config.micro_batch_bins):
        raise ValueError(
            f"batch_bins={config.batch_bins} must be a multiple of {processes} process(es) times "
            f"micro_batch_bins={config.micro_batch_bins}"
        )
    accumulation = config.batch_bins // processes // config.micro_batch_bins
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)

    # --- where the run goes on --------------------------------------------------------------------
    resume_from = next(reversed(checkpoints(output)), None)
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "lanes": {}}
    if resume_from:
        check_same_run(output / CONFIG, config, MAY_CHANGE)
        progress = load_progress(resume_from)
    step = progress["step"]
    if step > config.steps:
        raise ValueError(f"steps={config.steps}, but {resume_from} is of step {step}")
    began -= progress["seconds"]

    # --- data -------------------------------------------------------------------------------------
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(config, output)
        cut = Cut(config.max_length, config.split_documents)
        corpus = Corpus(config.data, tokenizer, cut, config.validation_documents)
    masking = Masking.of(tokenizer, config.mask_rate, config.mask_scheme)
    validation = corpus.validation(config.bin_tokens, masking)
    if validation and not any(batch.num_masked for batch in validation):
        raise ValueError(
            f"validation_documents={config.validation_documents}: none of their "
            f"{sum(batch.packed.num_tokens for batch in validation)} tokens is masked at "
            f"mask_rate={config.mask_rate}; hold out more documents, or none"
        )
    if accelerator.is_main_process:
        save_config(config, output / CONFIG)
    stream = TrainingStream(
        [
            corpus.lane(
                lane, config.batch_bins, config.bin_tokens, config.seed,
                progress["lanes"].get(str(lane)),
            )
            for lane in lanes
        ],
        masking, config.seed, config.micro_batch_bins, step,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip

    # --- model and optimizer ----------------------------------------------------------------------
    model_config = config.model_config()
    if len(tokenizer) > model_config.vocab_size:
        raise ValueError(
            f"model.vocab_size={model_config.vocab_size} is less than the tokenizer's "
            f"{len(tokenizer)} ids"
        )
    weights_from = resume_from or (config.start_from and locate(config.start_from))
    if weights_from:
        check_shape(weights_from, model_config)
        model = NeoBERTLMHead.from_pretrained(
            weights_from, dtype=torch.float32, max_length=config.max_length
        )
    else:
        model = NeoBERTLMHead(model_config)
    if config.fused_epilogues:
        fuse_epilogues(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.compile(dynamic=True)
    optimizer = adamw(
        model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay
    )
    model, optimizer = prepare(accelerator, model, optimizer)
    if weights_from and has_optimizer(weights_from):
        load_optimizer(Path(weights_from), accelerator, model, optimizer)
    model.train()

    # --- what the run says ------------------------------------------------------------------------
    metrics, hub, peak = None, None, math.nan
    if accelerator.is_main_process:
        metrics = Metrics("pretrain", output, step, config.steps, config.tensorboard, config.wandb)
        if config.push_to_hub:
            hub = HubPush(config.push_to_hub, metrics.say)
        low = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        peak = matmul_rate(accelerator.device, low) * processes
        metrics.say(
            f"{model_config.num_hidden_layers} layers of {model_config.hidden_size}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {processes} x "
            f"{accelerator.device.type}; a step is {config.batch_bins} bins of "
            f"{config.bin_tokens:,} tokens, {accumulation} forward passes per process"
        )
        if validation and step == 0:
            metrics.write(0, **{UNIGRAMS: unigram_entropy(validation, masking.special_ids)})

    result = Result(
        step, progress.get("loss", math.nan), progress.get("validation", {}), resume_from
    )
    since, tokens_since = time.perf_counter(), 0
    with stop_signals() as stop, stream:
        for batches, states in islice(stream, config.steps - step):
            # --- one step: forward and backward ---------------------------------------------------
            counts = torch.tensor(
                [
                    sum(batch.num_masked for batch in batches),
                    sum(batch.packed.num_tokens for batch in batches),
                    training_flop(model_config, batches),
                ],
                dtype=torch.float64,
                device=accelerator.device,
            )
            counts = accelerator.reduce(counts, "sum")
            masked = counts[0].clamp(min=1)
            logging = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            lr = learning_rate(
                step, config.steps, config.lr, config.warmup_steps, config.decay_fraction,
                config.min_lr_ratio,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
            correct = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
            for number, batch in enumerate(batches, 1):
                measured = logging and number == len(batches)
                with accelerator.accumulate(model):
                    part, hits = forward(model, batch, config, tokenizer, masked, measured)
                    # Processes are averaged and accumulation divides: undone here, for the sum is
                    # divided by the masked tokens of all processes and micro-batches already.
                    # (With the last of them DeepSpeed makes its update, too.)
                    accelerator.backward(part * (processes * accumulation))
                loss += part.detach()
                correct += hits

            # --- one step: the update -------------------------------------------------------------
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            sums = torch.stack([loss, *correct, torch.full_like(loss, stop.requested)])
            sums = torch.cat([accelerator.reduce(sums, "sum"), counts, whole(norm, loss)])
            # The only place where a step waits for the device.
            result.loss, right, tried, stopping, _, tokens, flop, norm = sums.tolist()
            if not math.isfinite(result.loss) or not math.isfinite(norm):
                kept = keep_batches(output, step, rank, batches)
                raise NonFiniteLossError(
                    f"step {step + 1}: loss {result.loss}, gradient norm {norm}; its micro-batches "
                    f"are in {kept}, and the weights before it in {result.checkpoint}"
                )
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            result.step = step
            progress["tokens"] += int(tokens)
            tokens_since += int(tokens)
            if stopping:
                result.stopped_by = stop.signum or signal.SIGTERM  # another process got it

            # --- what came of it ------------------------------------------------------------------
            if metrics:
                metrics.advance(result.loss)
                if logging:
                    seconds = time.perf_counter() - since
                    metrics.write(
                        step,
                        loss=result.loss,
                        masked_accuracy=right / max(1.0, tried),
                        gradient_norm=norm,
                        learning_rate=lr,
                        tokens=progress["tokens"],
                        seconds=time.perf_counter() - began,
                        tokens_per_second=tokens_since / seconds,
                        mfu=flop / tokens * tokens_since / seconds / peak,
                        packing_efficiency=tokens / config.batch_tokens,
                    )
                    since, tokens_since = time.perf_counter(), 0
            paused = time.perf_counter()
            if validation and (step % config.validate_every == 0 or step == config.steps):
                result.validation = evaluate(model, validation, config, accelerator, tokenizer)
                if metrics:
                    seconds = time.perf_counter() - began
                    metrics.write(step, **result.validation, seconds=seconds)
            if step % config.save_every == 0 or step == config.steps or result.stopped_by:
                progress["lanes"] = gather_states(accelerator, states)
                progress["seconds"] = time.perf_counter() - began
                progress |= {"loss": result.loss, "validation": result.validation}
                if hub:
                    hub.wait()  # saving may remove what is being uploaded
                result.checkpoint = save_checkpoint(
                    output, step, accelerator, model, optimizer, tokenizer, progress,
                    config.keep_checkpoints,
                )  # fmt: skip
                if hub:
                    hub.push(result.checkpoint, step)
            since += time.perf_counter() - paused
            if result.stopped_by:
                break

    if hub:
        hub.wait()
    if metrics:
        plot_losses(metrics.records, output / PLOT)
        metrics.close()
    accelerator.end_training()
    return result


def forward(
    model: nn.Module,
    batch: MaskedBatch,
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    divisor: Tensor | None = None,
    measure: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum of the masked tokens' losses over `divisor` (None: their number), and (2,) float64:
    how many of them are predicted right, of how many; zeros unless `measure`.

    bfloat16 is autocast here, whatever engine wraps the model: the engines' own mixed precision
    casts the parameters or the residual stream.
    """
    device = next(model.parameters()).device
    moved = batch.to(device)
    inputs = moved.padded_inputs(tokenizer.pad_token_id) if config.padded else moved.inputs()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        out: Any = model(
            **inputs,
            num_items_in_batch=divisor,
            output_logits="labelled" if measure else False,
        )
    hits = torch.zeros(2, dtype=torch.float64, device=device)
    if measure:
        hits[0] = (out.logits.argmax(-1) == moved.labels).sum()
        hits[1] = batch.num_masked
    return out.loss, hits


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: list[MaskedBatch],
    config: PretrainConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """Mean loss and accuracy over the masked tokens of the validation batches."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for first in range(0, len(batches), accelerator.num_processes):
        # All processes call the model as often, as FSDP demands; a surplus one's result is dropped.
        mine = first + accelerator.process_index
        batch = batches[min(mine, len(batches) - 1)]
        loss, hits = forward(model, batch, config, tokenizer)
        if mine < len(batches) and batch.num_masked:
            sums += torch.cat([loss.double().reshape(1) * hits[1], hits])
    model.train()
    total, right, tried = accelerator.reduce(sums, "sum").tolist()
    return {"validation_loss": total / tried, "validation_accuracy": right / tried}


def load_tokenizer(config: PretrainConfig, output: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `PretrainConfig.tokenizer` says; one trained here stays in `output`."""
    if config.tokenizer is not None:
        return AutoTokenizer.from_pretrained(config.tokenizer)
    if not config.data:
        raise ValueError("data names no source")
    first = config.data[0]
    if is_prepared(first.path):
        return TokenShards(first.path).tokenizer()
    if config.start_from is not None:
        return AutoTokenizer.from_pretrained(locate(config.start_from))
    if not (output / TOKENIZER).exists():
        data = open_texts(first)
        texts = (text for batch, _ in text_batches(data, first.field) for text in batch)
        learned = train_tokenizer(
            list(islice(texts, TOKENIZER_TEXTS)), config.model.vocab_size, config.max_length
        )
        learned.save_pretrained(output / TOKENIZER)
    return AutoTokenizer.from_pretrained(output / TOKENIZER)


def gather_states(accelerator: Accelerator, states: dict[int, dict]) -> dict[str, dict]:
    """The states of all processes' lanes."""
    everyone = [states]
    if accelerator.num_processes > 1:
        everyone = [{}] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, states)
    return {str(lane): state for each in everyone for lane, state in each.items()}


def keep_batches(output: Path, step: int, rank: int, batches: Sequence[Any]) -> Path:
    """Write a process's micro-batches of a step for inspection, as a list of their `inputs()`."""
    path = output / f"non-finite-step-{step + 1}-process-{rank}.pt"
    torch.save([batch.inputs() for batch in batches], path)
    return path
