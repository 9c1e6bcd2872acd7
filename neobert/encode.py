"""Texts → embeddings.

Texts are read in groups. A thread tokenizes the next group, sorts it by token count, cuts it into
batches of at most `max_tokens` tokens and packs them, while this one is computed; memory is
bounded by two groups whatever the number of texts. Nothing is ever padded.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neobert.devices import MAX_TOKENS, device_and_dtype
from neobert.graphs import CudaCapturer, PackedGraphs
from neobert.groups import check_text, check_unicode, in_groups
from neobert.invariance import make_batch_invariant, unit_length
from neobert.locate import locate
from neobert.model import NeoBERT
from neobert.packing import PackedBatch, pack, token_budget_batches
from neobert.prepared import PreparedNeoBERT
from neobert.sentence_folder import Pooling, SentenceFolder, read_sentence_folder
from neobert.text import TextTokenizer
from neobert_kernels import pool


class TruncationWarning(UserWarning):
    """Texts were longer than max_length tokens, and their ends were not read."""


@dataclass
class EncodeStats:
    """What one call of `encode` or `encode_stream` did, so far or in all.

    texts, tokens: the number encoded; `tokens` counts special tokens, and there is no padding.
    truncated: how many texts were longer than max_length tokens.
    seconds: wall time since the call, tokenizing included.
    batches, graphed: how many batches were computed, and how many of them as a replayed CUDA graph.
    """

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    batches: int = 0
    graphed: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Options:
    pooling: Pooling
    normalize: bool
    prompt: str
    max_length: int
    max_tokens: int


@dataclass(frozen=True)
class _Group:
    """A group of tokenized texts: batches, and the place of their sequences in the group."""

    batches: list[PackedBatch]
    order: Tensor  # (texts,) int64: sequence i of the batches in a row is text order[i]
    truncated: int


class Encoder:
    """A NeoBERT and its tokenizer, from texts to embeddings.

    model: the encoder, already on its device and in its dtype; it is put in eval mode.
    tokenizer: its fast tokenizer.
    max_length: the most tokens of a text, special tokens included; what is beyond is cut off.
        By default that of `folder`, or else the length the model was trained for,
        `model.config.max_length`.
    cuda_graphs: compute small batches, queries above all, as one replayed CUDA graph each
        (`neobert.graphs`). The first batch of a size waits for its capture. Batches beyond the
        largest graph are computed as ever; `stats.graphed` and the log say so.
    batch_invariant: a text gets the same bits alone, in any batch and in any order. With the
        compiled CPU kernels and without AMX it does so in any case; see `neobert.invariance`, also
        for its ValueError.
    fused_epilogues: compute a layer as five kernels, with norms, rotation, SwiGLU and residual adds
        in the GEMMs' epilogues (`neobert.prepared`), from a copy of the weights as they are now.
        For GPUs; its speed there is not measured yet, so it is not the default.
    folder: how the model's embeddings are made where a call does not say: the pooling, whether they
        are normalized, and the prompt. By default means, not normalized, without a prompt.
    Raises ValueError if `max_length` is beyond the model's, or if the tokenizer has ids that the
    model has no embedding for, or if `cuda_graphs` are asked of a model that is not on a GPU, or
    `fused_epilogues` of one with adapters or hooks, or both of batch_invariant and fused_epilogues.
    """

    def __init__(
        self,
        model: NeoBERT,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        cuda_graphs: bool = False,
        batch_invariant: bool = False,
        fused_epilogues: bool = False,
        folder: SentenceFolder | None = None,
    ):
        if batch_invariant and fused_epilogues:
            raise ValueError(
                "batch_invariant and fused_epilogues: fused kernels do not promise a text's bits"
            )
        if batch_invariant:
            make_batch_invariant(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._tokenize = TextTokenizer(tokenizer)
        if self._tokenize.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {self._tokenize.vocab_size} ids, but the model has embeddings for "
                f"{model.config.vocab_size}"
            )
        self.folder = folder or SentenceFolder()
        self.max_length = self._checked_max_length(
            self.folder.max_length if max_length is None else max_length, model.config.max_length
        )
        self._prepared = PreparedNeoBERT(model) if fused_epilogues else None
        self._graphs: PackedGraphs | None = None
        if cuda_graphs:
            self._graphs = PackedGraphs(
                self._embed,
                self._prepared or model,
                model.config.max_length,
                model.config.pad_token_id or 0,
                CudaCapturer(model.device),
            )
        self.stats = EncodeStats()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        cuda_graphs: bool = False,
        batch_invariant: bool = False,
        fused_epilogues: bool = False,
        **hub_options: Any,
    ) -> Encoder:
        """Load a checkpoint directory, the newest checkpoint of a training run's output, or a hub
        repository, `chandar-lab/NeoBERT` for one.

        device: by default the GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16", "float16" or the torch.dtype of the weights and activations;
            by default bfloat16 on a GPU and float32 on a CPU. Embeddings are float32 always.
        max_length, cuda_graphs, batch_invariant, fused_epilogues: see `Encoder`.
        hub_options: passed on to transformers (revision, token, cache_dir, local_files_only, …).

        Of a sentence-transformers model, `neobert contrastive`'s too, pooling, length, prompts and
        normalization are taken (`neobert.sentence_folder`). Raises ValueError where it has a module
        or a pooling that is not computed here.
        """
        path_or_hub_id = locate(path_or_hub_id, hub_options.get("subfolder") or "")
        device, dtype = device_and_dtype(device, dtype)
        folder = read_sentence_folder(path_or_hub_id, **hub_options)
        tokenizer = AutoTokenizer.from_pretrained(path_or_hub_id, **hub_options)
        model = NeoBERT.from_pretrained(path_or_hub_id, dtype=dtype, **hub_options)
        return cls(
            model.to(device),
            tokenizer,
            max_length,
            cuda_graphs,
            batch_invariant,
            fused_epilogues,
            folder,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dim(self) -> int:
        """Width of an embedding, 768 for the released model."""
        return self.model.config.hidden_size

    def encode(
        self,
        texts: str | Iterable[str],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | Tensor:
        """Embeddings of `texts`, (texts, dim) float32 in input order; (dim,) for a single str.

        pooling: "mean" over a text's tokens, special tokens and prompt included, as in the
            NeoBERT paper, or "cls", the first token's; by default the model's (`folder.pooling`).
        normalize: scale each embedding to length 1; by default if the model does.
        prompt: put before every text ("query: "), and pooled with it, "" for none; by default
            `folder.default_prompt`, mostly "". `folder.prompts` has the model's by name.
        max_length: the most tokens of a text, special tokens and prompt included. If texts are
            truncated, one warning says how many, and `stats.truncated` holds the number.
        max_tokens: the most tokens computed at once; a text longer than that is computed alone.
        show_progress_bar: None shows it when standard error is a terminal.
        convert_to_tensor: return a tensor on the model's device, not a NumPy array.

        Raises TypeError, with the index, for a text that is not a str, before computing anything.
        """
        items = [texts] if isinstance(texts, str) else list(_iterable(texts))
        for index, text in enumerate(items):
            check_text(text, index)
        device = self.device if convert_to_tensor else "cpu"
        embeddings = torch.empty(len(items), self.dim, dtype=torch.float32, device=device)
        stream = self.encode_stream(
            items,
            pooling,
            normalize,
            prompt,
            max_length,
            max_tokens,
            show_progress_bar,
            total=len(items),
        )
        start = 0
        with closing(stream):
            for rows in stream:
                embeddings[start : start + len(rows)] = rows
                start += len(rows)
        if isinstance(texts, str):
            embeddings = embeddings[0]
        return embeddings if convert_to_tensor else embeddings.numpy()

    def encode_stream(
        self,
        texts: Iterable[str],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        total: int | None = None,
    ) -> Generator[Tensor]:
        """Embeddings of any number of texts in bounded memory.

        Yields (n, dim) float32 tensors on the model's device, which in a row are the embeddings in
        input order. `texts` is read in the calling thread, a group ahead of the computation.
        total: the number of texts if it is known, for the progress bar. Else as `encode`.
        """
        pooling, normalize = self._defaults(pooling, normalize)
        if prompt is None:
            prompt = self.folder.default_prompt
        if max_tokens is None:
            max_tokens = MAX_TOKENS[self.device.type]
        elif max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        max_length = self._checked_max_length(max_length, self.max_length)
        options = _Options(pooling, normalize, prompt, max_length, max_tokens)
        if show_progress_bar is None:
            show_progress_bar = sys.stderr.isatty()
        return self._stream(_iterable(texts), options, show_progress_bar, total)

    def _stream(
        self, texts: Iterable[str], options: _Options, show_progress_bar: bool, total: int | None
    ) -> Generator[Tensor]:
        started = time.perf_counter()
        stats = self.stats = EncodeStats()
        thread = ThreadPoolExecutor(1, thread_name_prefix="neobert-tokenize")
        groups = in_groups(texts, options.max_tokens, options.max_length, len(options.prompt))

        def tokenize_next() -> Future[_Group] | None:
            group = next(groups, None)
            if group is None:
                return None
            given, first, last = group
            if first == 0 and last:  # nothing is computed meanwhile: no thread for a query
                done: Future[_Group] = Future()
                done.set_result(self._prepare(given, first, options))
                return done
            return thread.submit(self._prepare, given, first, options)

        try:
            with tqdm(
                total=total, desc="encode", unit="text", disable=not show_progress_bar
            ) as progress:
                upcoming = tokenize_next()
                while upcoming is not None:
                    group = upcoming.result()
                    upcoming = tokenize_next()
                    pooled = []
                    for batch, rows in self._compute(group.batches, options, stats):
                        pooled.append(rows)
                        stats.batches += 1
                        stats.texts += batch.num_sequences
                        stats.tokens += batch.num_tokens
                        stats.seconds = time.perf_counter() - started
                        progress.set_postfix_str(
                            f"{stats.tokens_per_second:,.0f} tok/s", refresh=False
                        )
                        progress.update(batch.num_sequences)
                    stats.truncated += group.truncated
                    rows = torch.cat(pooled)
                    embeddings = torch.empty_like(rows)
                    embeddings[group.order.to(self.device)] = rows
                    yield embeddings
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
        stats.seconds = time.perf_counter() - started
        if stats.truncated:
            warnings.warn(
                f"{stats.truncated} of {stats.texts} texts were longer than max_length="
                f"{options.max_length} tokens and were truncated",
                TruncationWarning,
                stacklevel=3,
            )

    def _prepare(self, texts: list[str], first: int, options: _Options) -> _Group:
        """Tokenize and pack a group of texts, the first of them text number `first` of the call."""
        try:
            sequences, truncated = self._tokenize(
                [options.prompt + text for text in texts] if options.prompt else texts,
                options.max_length,
            )
        except (TypeError, UnicodeEncodeError) as error:
            for index, text in enumerate(texts, first):
                check_unicode(text, index, error)
            raise
        batches = token_budget_batches([len(ids) for ids in sequences], options.max_tokens)
        return _Group(
            [pack([sequences[index] for index in batch]) for batch in batches],
            torch.tensor([index for batch in batches for index in batch]),
            truncated,
        )

    def _compute(
        self, batches: list[PackedBatch], options: _Options, stats: EncodeStats
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Each batch with its pooled rows. On a GPU, one batch behind the one being launched."""
        launched: tuple[PackedBatch, Tensor, torch.cuda.Event] | None = None
        for batch in batches:
            rows, graphed = self._pooled(batch, options.pooling, options.normalize)
            stats.graphed += graphed
            if self.device.type != "cuda":
                yield batch, rows
                continue
            # Waiting for the batch before keeps the queue short and the progress bar true, while
            # the GPU always has this one to work on.
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            if launched:
                launched[2].synchronize()
                yield launched[:2]
            launched = batch, rows, done
        if launched:
            launched[2].synchronize()
            yield launched[:2]

    def embed(
        self, batch: PackedBatch, pooling: Pooling | None = None, normalize: bool | None = None
    ) -> Tensor:
        """Embeddings of texts that are token ids already: (sequences, dim) float32 on the model's
        device, of a batch packed on the host. On a GPU it does not wait for them."""
        return self._pooled(batch, *self._defaults(pooling, normalize))[0]

    @torch.inference_mode()
    def _pooled(self, batch: PackedBatch, pooling: Pooling, normalize: bool) -> tuple[Tensor, bool]:
        """What `embed` returns, and whether it is a replayed CUDA graph's."""
        if self._graphs is not None:
            rows = self._graphs(batch, pooling, normalize)
            if rows is not None:
                return rows, True
        return self._embed(batch.to(self.device, non_blocking=True), pooling, normalize), False

    def _embed(self, batch: PackedBatch, pooling: Pooling, normalize: bool) -> Tensor:
        if self._prepared is not None:
            hidden = self._prepared(batch)
        else:
            hidden = self.model(**batch.inputs()).last_hidden_state[0]
        rows = pool(hidden, batch.cu_seqlens, pooling)
        return unit_length(rows) if normalize else rows

    def _defaults(self, pooling: Pooling | None, normalize: bool | None) -> tuple[Pooling, bool]:
        """What is asked for, and the model's own where nothing is."""
        pooling = self.folder.pooling if pooling is None else pooling
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        return pooling, self.folder.normalize if normalize is None else normalize

    def _checked_max_length(self, max_length: int | None, default: int) -> int:
        if max_length is None:
            return default
        least, most = self._tokenize.num_special + 1, self.model.config.max_length
        if not least <= max_length <= most:
            raise ValueError(
                f"max_length must be between {least} (the special tokens and one more) and {most} "
                f"(the model's), got {max_length}"
            )
        return max_length


def _iterable(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a list or another iterable of str, got {type(texts)}")
    return texts
