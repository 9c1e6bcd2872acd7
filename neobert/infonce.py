"""The contrastive loss, its negatives shared by all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


def info_nce(
    queries: Tensor, candidates: Tensor, targets: Tensor, masked: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE on cosine similarity (paper, §5.2.1): the sum over queries of
    -log(exp(s(q, d+) / t) / sum of exp(s(q, d) / t) over all candidates d that are not masked).

    queries: (queries, dim); candidates: (candidates, dim); targets: (queries,) int64, the place of
    each query's positive; masked: (queries, candidates) bool, those that do not count as negatives.
    Also returns how many queries have their positive nearest, as an integer tensor.
    """
    similarities = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
    logits = (similarities / temperature).masked_fill(masked, -torch.inf)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()


@dataclass(frozen=True)
class CachedLoss:
    """A process's part of a batch's loss and of its gradient.

    loss: the sum over this process's queries, divided by the queries of all; correct: how many of
    its queries have their positive nearest. gradient: (texts, dim) that of the whole batch's loss
    with respect to the process's embeddings.
    """

    loss: Tensor
    correct: Tensor
    gradient: Tensor


def cached_loss(
    embeddings: Tensor,
    counts: list[int],
    targets: Tensor,
    masked: Tensor,
    temperature: float,
    accelerator: Accelerator,
) -> CachedLoss:
    """The loss of a process's queries against the candidates of all processes.

    embeddings: (texts, dim), the process's queries, then its candidates. counts: how many
    candidates each process has. targets, masked: as in `info_nce`, among the candidates of all.
    """
    number = len(targets)
    rank, device = accelerator.process_index, embeddings.device
    queries = embeddings[:number].detach().requires_grad_()
    candidates = gather_rows(embeddings[number:].detach(), counts, accelerator).requires_grad_()
    loss, correct = info_nce(
        queries, candidates, targets.to(device), masked.to(device), temperature
    )
    loss = loss / (number * accelerator.num_processes)
    of_queries, of_candidates = torch.autograd.grad(loss, [queries, candidates])
    # Every process's queries pull and push this process's candidates.
    of_candidates = accelerator.reduce(of_candidates, "sum")
    mine = of_candidates.split(counts)[rank]
    return CachedLoss(loss.detach(), correct, torch.cat([of_queries, mine]))


def gather_rows(rows: Tensor, counts: list[int], accelerator: Accelerator) -> Tensor:
    """(all rows, dim), the processes' rows one after the other; counts: how many each has."""
    if accelerator.num_processes == 1:
        return rows
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    parts = accelerator.gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
