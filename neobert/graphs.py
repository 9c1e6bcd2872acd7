"""Packed batches as replayed CUDA graphs.

Below about 700 tokens a GPU computes a layer faster than the host can launch it. A graph launches
all layers at once, but for the shapes it was captured with only. So a batch is put into a bucket,
the next larger number of tokens and of sequences, and copied into the graph's own input: the
tokens beyond those of the batch are padding that belongs to no sequence (the last offset is
repeated), which attention and pooling pass over.

A graph's result has the bits of an eager run on the same padded tensors. Those of an eager run
without the padding it has too where the bits of a row do not depend on the number of rows, which
our kernels promise and PyTorch's GEMM on a GPU does not.

Graphs are captured when they are first needed, and the least recently used is dropped beyond
MAX_GRAPHS: the buckets of all options are more than a driver should hold, and a service uses few.
All share one memory pool, in which one graph's scratch is the next one's, so replays take turns.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neobert.packing import PackedBatch

logger = logging.getLogger(__name__)

# From 128 tokens on, at most a third is padding; from 512 on, a quarter. Chosen from the model's
# arithmetic and not measured: at 2,048 tokens a GPU is busy for longer than it takes to launch.
TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
SEQUENCES = (1, 8, 64, 512)  # an empty sequence costs a row of zeros
SHORT = 128  # tokens; up to here one tile of attention holds all keys
MAX_GRAPHS = 64

Replay = Callable[[], Tensor]


class Bucket(NamedTuple):
    """The shape of a graph: sizes of its input, and the longest sequence that it may hold."""

    tokens: int
    sequences: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: PackedBatch, max_length: int) -> Bucket | None:
        """The smallest bucket that holds the batch; None if it is larger than all of them, or has
        a sequence longer than max_length, the model's."""
        if (
            batch.num_tokens > TOKENS[-1]
            or batch.num_sequences > SEQUENCES[-1]
            or batch.max_seqlen > max_length
        ):
            return None
        tokens = TOKENS[bisect_left(TOKENS, batch.num_tokens)]
        sequences = SEQUENCES[bisect_left(SEQUENCES, batch.num_sequences)]
        longest = SHORT if batch.max_seqlen <= SHORT else tokens
        return cls(tokens, sequences, min(longest, tokens, max_length))

    @property
    def input_size(self) -> int:
        return 2 * self.tokens + self.sequences + 1

    def views(self, flat: Tensor) -> PackedBatch:
        """`flat`, (input_size,) int32, as ids, positions and cu_seqlens."""
        ids, positions, cu_seqlens = flat.split([self.tokens, self.tokens, self.sequences + 1])
        return PackedBatch(ids, positions, cu_seqlens, self.max_seqlen)

    def fill(self, flat: Tensor, batch: PackedBatch, pad_id: int) -> None:
        """Writes the batch, and after it pad_id, position 0 and the last offset again and again.
        All on the host: the batch is then one copy to the GPU."""
        padded, n, last = self.views(flat), batch.num_tokens, batch.num_sequences + 1
        padded.input_ids[:n], padded.input_ids[n:] = batch.input_ids, pad_id
        padded.positions[:n], padded.positions[n:] = batch.positions, 0
        padded.cu_seqlens[:last], padded.cu_seqlens[last:] = batch.cu_seqlens, n


class Capturer(Protocol):
    """What PackedGraphs asks of the device."""

    device: torch.device

    def host_buffer(self, size: int) -> Tensor:
        """(size,) int32 on the host, to be copied to the device without waiting."""

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """Runs the function, and returns what runs it again, into the same output tensor."""

    def turn(self) -> AbstractContextManager[None]:
        """What is enqueued within comes after what was enqueued in earlier turns."""

    def reset(self) -> None:
        """Waits until the device has done everything; what was captured is about to go."""


class CudaCapturer:
    """Captures on a stream of its own, into one memory pool.

    device: a CUDA device. Raises ValueError for another.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a model on a CUDA device, it is on {device}")
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    def host_buffer(self, size: int) -> Tensor:
        # PyTorch hands out pinned memory again only when the copies from it are done.
        return torch.empty(size, dtype=torch.int32, pin_memory=True)

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        # First outside the graph, for in a capture nothing may be compiled or loaded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile neither fails nor is captured.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        # The caller's stream may be another one each time.
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def reset(self) -> None:
        torch.cuda.synchronize(self.device)
        self._pool = torch.cuda.graph_pool_handle()  # PyTorch forgets a pool without graphs


class PackedGraphs:
    """A function of packed batches on a device, by graphs that are bit-equal to it (see above).

    function: (batch on the device, *options) → (sequences, …), one row a sequence. It launches
        the same kernels whatever the values in the batch; hooks in it run at capture only.
    module: whose parameters and buffers the function reads. They may change in place; if they are
        replaced or moved (`module.to`), the graphs are captured anew.
    max_length: the most tokens of a sequence that the function takes.
    pad_id: the token id of padding.
    capturer: makes the graphs; the module is on its device.

    Any number of threads may call, each on its own stream.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        max_length: int,
        pad_id: int,
        capturer: Capturer,
    ):
        self._function = function
        self._module = module
        self._max_length = max_length
        self._pad_id = pad_id
        self._capturer = capturer
        self._weights = _Weights(module)
        self._graphs: OrderedDict[Hashable, tuple[Tensor, Replay]] = OrderedDict()
        self._lock = threading.Lock()
        self._said_too_large = False

    def __len__(self) -> int:
        """The number of graphs held."""
        return len(self._graphs)

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, *options: Hashable) -> Tensor | None:
        """function(batch, *options) for a batch on the host; None if no bucket is large enough."""
        bucket = Bucket.of(batch, self._max_length)
        if bucket is None:
            self._say_too_large(batch)
            return None
        with self._lock, self._capturer.turn():
            flat = self._capturer.host_buffer(bucket.input_size)
            bucket.fill(flat, batch, self._pad_id)
            output = self._replayed(bucket, options, flat)
            if self._weights.replaced():  # asked here, while the GPU is at work
                self._start_anew()
                output = self._replayed(bucket, options, flat)
            return output[: batch.num_sequences].clone()

    def _replayed(self, bucket: Bucket, options: tuple[Hashable, ...], flat: Tensor) -> Tensor:
        """The graph's own output, which the next replay of any graph may overwrite."""
        kind = self._capturer.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = bucket, options, autocast
        if key in self._graphs:
            self._graphs.move_to_end(key)
            graph_input, replay = self._graphs[key]
            graph_input.copy_(flat, non_blocking=True)
            return replay()
        graph_input = flat.to(self._capturer.device, copy=True)
        batch = bucket.views(graph_input)
        replay = self._capturer.capture(lambda: self._function(batch, *options))
        self._graphs[key] = graph_input, replay
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return replay()

    def _start_anew(self) -> None:
        self._capturer.reset()
        self._graphs.clear()
        self._weights = _Weights(self._module)
        device = self._weights.device
        if device != self._capturer.device:
            raise RuntimeError(
                f"the graphs were made for {self._capturer.device}, but the model has been moved"
                f" to {device}"
            )

    def _say_too_large(self, batch: PackedBatch) -> None:
        if not self._said_too_large:
            self._said_too_large = True
            logger.warning(
                "a batch of %d tokens in %d sequences is larger than the largest CUDA graph, %d"
                " tokens in %d sequences: computed without one (said once)",
                *(batch.num_tokens, batch.num_sequences, TOKENS[-1], SEQUENCES[-1]),
            )


class _Weights:
    """The tensors of a module as they are now. Held, so that a graph never reads freed memory."""

    def __init__(self, module: nn.Module):
        self._tensors = [
            (tensors, name, tensor, tensor.data)
            for part in module.modules()
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    @property
    def device(self) -> torch.device:
        return self._tensors[0][2].device

    def replaced(self) -> bool:
        """Whether the module now has another tensor somewhere, or one with its data elsewhere."""
        return any(
            tensors.get(name) is not tensor or tensor.data_ptr() != data.data_ptr()
            for tensors, name, tensor, data in self._tensors
        )
