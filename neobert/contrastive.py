"""Contrastive fine-tuning: a pre-trained encoder learns to embed (paper, §5.2.1, Appendix D.2).

    neobert contrastive --preset tiny start_from=runs/tiny
    torchrun --nproc-per-node 8 -m neobert contrastive --config configs/contrastive-paper.yaml

A step takes pairs of one data set; each query must find its positive among the positives and hard
negatives of all. Texts are packed, and the batch is as large as it should be, not as memory allows
(`neobert.gradcache`). Everything that happens in a run is in `contrastive`, in the order in which
it happens.
"""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import AutoTokenizer

from neobert.contrastive_recipes import ContrastiveConfig
from neobert.engine import CONFIG, NonFiniteLossError, prepare, start_accelerator, whole
from neobert.gradcache import Chunk, backward_all, embed_all, in_company
from neobert.hub import HubPush
from neobert.infonce import cached_loss
from neobert.locate import checkpoints, locate
from neobert.metrics import PLOT, Metrics, forward_flop, matmul_rate, plot_losses
from neobert.model import NeoBERT, NeoBERTConfig
from neobert.optim import adamw, learning_rate
from neobert.packing import PackedBatch
from neobert.pair_batches import PairBatch, PairSampler, shares
from neobert.pairs import Pairs, prompts_of
from neobert.saving import (
    export_model,
    load_optimizer,
    load_progress,
    save_checkpoint,
)
from neobert.sentence_folder import write_sentence_folder
from neobert.settings import check_same_run, save_config
from neobert.signals import stop_signals
from neobert.text import TextTokenizer
from neobert_kernels import pool

MODEL = "model"  # the finished model, in the run's output

# A run may go on with other values of these.
MAY_CHANGE = {"output", "max_tokens", "precision", "gradient_checkpointing", "compile", "log_every",
              "save_every", "keep_checkpoints", "tensorboard", "wandb", "push_to_hub",
              "steps"}  # fmt: skip


@dataclass
class Result:
    """How a run ended: the last step, its loss, and its accuracy: the share of queries whose
    positive was the nearest candidate.

    checkpoint: the last one. model: the finished model, a folder for sentence-transformers and
    `Encoder`. left_out: of each data set, its pairs and what was left out. stopped_by: the number
    of the signal that ended it early, if one did.
    """

    step: int
    loss: float
    accuracy: float
    checkpoint: Path | None = None
    model: Path | None = None
    left_out: list[str] = field(default_factory=list)
    stopped_by: int | None = None


def contrastive(config: ContrastiveConfig) -> Result:
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
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("contrastive training runs on one process, DDP or FSDP, not on DeepSpeed")
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {processes} process(es)"
        )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)

    # --- where the run goes on --------------------------------------------------------------------
    resume_from = next(reversed(checkpoints(output)), None)
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "masked": 0, "truncated": 0, "seconds": 0.0}
    if resume_from:
        check_same_run(output / CONFIG, config, MAY_CHANGE)
        progress = load_progress(resume_from)
    step = progress["step"]
    if step > config.steps:
        raise ValueError(f"steps={config.steps}, but {resume_from} is of step {step}")
    began -= progress["seconds"]

    # --- data -------------------------------------------------------------------------------------
    weights_from = resume_from or locate(config.start_from)
    tokenizer = AutoTokenizer.from_pretrained(weights_from)
    tokenize = TextTokenizer(tokenizer)
    if not config.data:
        raise ValueError("data names no source")
    with accelerator.main_process_first():
        data = [Pairs(source) for source in config.data]
    sampler = PairSampler(
        config.data, data, config.batch_size, config.hard_negatives, config.alpha, config.seed
    )
    if accelerator.is_main_process:
        save_config(config, output / CONFIG)

    # --- model and optimizer ----------------------------------------------------------------------
    model = load_model(weights_from, config, tokenize)
    model_config: Any = model.config
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.compile(dynamic=True)
    optimizer = adamw(
        model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay
    )
    model, optimizer = prepare(accelerator, model, optimizer)
    if resume_from:
        load_optimizer(resume_from, accelerator, model, optimizer)
    model.train()
    embed = partial(embedded, model, config, accelerator.device)
    no_sync = partial(accelerator.no_sync, model)
    write_more = partial(
        write_sentence_folder,
        dim=model_config.hidden_size,
        max_length=config.max_length,
        prompts=prompts_of(config.data),
    )

    # --- what the run says ------------------------------------------------------------------------
    metrics, hub, peak = None, None, math.nan
    result = Result(
        step,
        progress.get("loss", math.nan),
        progress.get("accuracy", math.nan),
        resume_from,
        left_out=[each.report() for each in data],
    )
    if accelerator.is_main_process:
        metrics = Metrics(
            "contrastive", output, step, config.steps, config.tensorboard, config.wandb
        )
        if config.push_to_hub:
            hub = HubPush(config.push_to_hub, metrics.say)
        low = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        peak = matmul_rate(accelerator.device, low) * processes
        for line in result.left_out:
            metrics.say(line)

    since, tokens_since, flop_since = time.perf_counter(), 0.0, 0.0
    steps = range(step, config.steps)
    with stop_signals() as stop:
        for share in shares(
            sampler, steps, rank, processes, tokenize, config.max_length, config.max_tokens
        ):
            # --- one step: embeddings, the loss, and its gradient ---------------------------------
            lr = learning_rate(
                step, config.steps, config.lr, config.warmup_steps, config.decay_fraction,
                config.min_lr_ratio,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            chunks = in_company(share.chunks, most_chunks(share.chunks, accelerator))
            forward = embed_all(chunks, embed, no_sync)
            part = cached_loss(
                forward.embeddings, share.counts, share.targets, share.masked,
                config.temperature, accelerator,
            )  # fmt: skip
            backward_all(
                chunks, forward, part.gradient * processes,  # for processes are averaged
                embed, accelerator.backward, no_sync,
            )  # fmt: skip

            # --- one step: the update -------------------------------------------------------------
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            counts = [share.masked.sum(), share.truncated, *work(model_config, share.chunks)]
            sums = torch.tensor([*counts, stop.requested], dtype=torch.float64)
            sums = torch.cat([torch.stack([part.loss, part.correct]), sums.to(part.loss.device)])
            sums = torch.cat([accelerator.reduce(sums, "sum"), whole(norm, sums)])
            # Here a step waits for the device; with several processes in `most_chunks`, too.
            result.loss, correct, masked, truncated, tokens, flop, stopping, norm = sums.tolist()
            if not math.isfinite(result.loss) or not math.isfinite(norm):
                kept = output / f"non-finite-step-{step + 1}.json"
                if accelerator.is_main_process:
                    keep_batch(kept, share.batch)
                accelerator.wait_for_everyone()
                raise NonFiniteLossError(
                    f"step {step + 1}: loss {result.loss}, gradient norm {norm}; its pairs are in "
                    f"{kept}, and the weights before it in {result.checkpoint or weights_from}"
                )
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            result.step, result.accuracy = step, correct / config.batch_size
            progress["tokens"] += int(tokens)
            progress["masked"] += int(masked)
            progress["truncated"] += int(truncated)
            tokens_since, flop_since = tokens_since + tokens, flop_since + flop
            if stopping:
                result.stopped_by = stop.signum or signal.SIGTERM  # another process got it

            # --- what came of it ------------------------------------------------------------------
            if metrics:
                metrics.advance(result.loss)
                if step % config.log_every == 0 or step == config.steps:
                    seconds = time.perf_counter() - since
                    title = share.batch.source.title
                    by_source = {f"loss/{title}": result.loss} if len(data) > 1 else {}
                    metrics.write(
                        step,
                        loss=result.loss,
                        **by_source,
                        accuracy=result.accuracy,
                        gradient_norm=norm,
                        learning_rate=lr,
                        pairs=step * config.batch_size,
                        tokens=progress["tokens"],
                        masked_negatives=progress["masked"],
                        truncated_texts=progress["truncated"],
                        seconds=time.perf_counter() - began,
                        tokens_per_second=tokens_since / seconds,
                        mfu=flop_since / seconds / peak,
                    )
                    since, tokens_since, flop_since = time.perf_counter(), 0.0, 0.0
            if step % config.save_every == 0 or step == config.steps or result.stopped_by:
                paused = time.perf_counter()
                progress["seconds"] = paused - began
                progress |= {"loss": result.loss, "accuracy": result.accuracy}
                if hub:
                    hub.wait()  # saving may remove what is being uploaded
                result.checkpoint = save_checkpoint(
                    output, step, accelerator, model, optimizer, tokenizer, progress,
                    config.keep_checkpoints, write_more,
                )  # fmt: skip
                if hub:
                    hub.push(result.checkpoint, step)
                since += time.perf_counter() - paused
            if result.stopped_by:
                break

    if step == config.steps and result.checkpoint:
        result.model = output / MODEL
        if accelerator.is_main_process:
            export_model(result.checkpoint, result.model)
        accelerator.wait_for_everyone()
    if hub:
        hub.wait()
    if metrics:
        plot_losses(metrics.records, output / PLOT, "InfoNCE loss (nats per query)")
        metrics.close()
    accelerator.end_training()
    return result


def embedded(
    model: nn.Module, config: ContrastiveConfig, device: torch.device, packed: PackedBatch
) -> Tensor:
    """(sequences, dim) float32, the means over each sequence's tokens."""
    batch = packed.to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        hidden = model(**batch.inputs()).last_hidden_state[0]
    return pool(hidden, batch.cu_seqlens)


def load_model(
    weights_from: str | Path, config: ContrastiveConfig, tokenize: TextTokenizer
) -> NeoBERT:
    """The encoder of a checkpoint, with or without a masked-LM head, in float32."""
    model = NeoBERT.from_pretrained(weights_from, dtype=torch.float32)
    if tokenize.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {weights_from} has {tokenize.vocab_size} ids, but its model has "
            f"embeddings for {model.config.vocab_size}"
        )
    if config.max_length > model.config.max_length:
        raise ValueError(
            f"max_length={config.max_length} is beyond the {model.config.max_length} tokens of "
            f"the model in {weights_from}"
        )
    return model


def most_chunks(chunks: list[Chunk], accelerator: Accelerator) -> int:
    """The largest number of chunks that a process has in this step."""
    if accelerator.num_processes == 1:
        return len(chunks)
    mine = torch.tensor([len(chunks)], device=accelerator.device)
    return int(accelerator.gather(mine).max())


def work(config: NeoBERTConfig, chunks: list[Chunk]) -> tuple[int, int]:
    """Tokens, and floating-point operations of one forward and backward pass; what the second
    forward pass computes again does not count."""
    lengths = torch.cat([chunk.packed.cu_seqlens.diff() for chunk in chunks]).long()
    tokens, squares = int(lengths.sum()), int(lengths.square().sum())
    return tokens, 3 * forward_flop(config, tokens, squares)


def keep_batch(path: Path, batch: PairBatch) -> None:
    """Write a step's pairs for inspection."""
    content = {
        "data": batch.source.title,
        "prompt": batch.source.prompt,
        "queries": batch.queries,
        "positives": batch.positives,
        "negatives": batch.negatives,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
