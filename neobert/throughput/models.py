"""The contestants as they are run: built at their published shapes, padded or packed, each with
the best attention that this machine has for it."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.devices import MAX_TOKENS
from neobert.encode import Encoder
from neobert.model import NeoBERT
from neobert.packing import PackedBatch, pack, token_budget_batches
from neobert.plain import PlainNeoBERT
from neobert.throughput.shapes import Contestant, Shape
from neobert.throughput.workloads import made_up_tokenizer

Sequences = list[list[int]]
Step = Callable[[], object]


class Runner(ABC):
    """A model as it is run: `Padded` or `Packed`."""

    def __init__(self, device: torch.device, attention: str):
        self.device, self.attention = device, attention

    @abstractmethod
    def inputs(self, sequences: Sequences, together: bool = True) -> list[Any]:
        """The sequences on the device: as one batch, or with `together=False` as several where
        the model's users would split it."""

    @abstractmethod
    def run(self, inputs: list[Any]) -> Tensor:
        """Final hidden states of what `inputs` returned."""

    @abstractmethod
    def hidden(self, sequences: Sequences) -> list[Tensor]:
        """(length, dim) for each sequence."""

    @abstractmethod
    def from_strings(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Step:
        """A function from the texts to the vectors of their first tokens, on the host."""

    def query(self, sequences: Sequences) -> Step:
        """A function that computes them as `run` does, for its latency."""
        inputs = self.inputs(sequences)
        return lambda: self.run(inputs)


class Padded(Runner):
    """A model that takes (batch, length) ids and a keep-mask, or None where nothing is padding:
    SDPA has faster kernels without a mask, and a batch without padding gets them."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor | None], Tensor],
        device: torch.device,
        attention: str,
    ):
        super().__init__(device, attention)
        self.forward = forward

    def inputs(self, sequences: Sequences, together: bool = True) -> list[Any]:
        """One batch in any case."""
        rows = [torch.tensor(ids) for ids in sequences]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in sequences])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        keep = None if mask.all() else mask.to(self.device)
        return [(input_ids.to(self.device), keep)]

    def run(self, inputs: list[Any]) -> Tensor:
        """(batch, length, dim) final hidden states."""
        ((input_ids, mask),) = inputs
        return self.forward(input_ids, mask)

    def hidden(self, sequences: Sequences) -> list[Tensor]:
        rows = self.run(self.inputs(sequences))
        return [row[: len(ids)] for row, ids in zip(rows, sequences, strict=True)]

    def from_strings(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Step:
        def step() -> Tensor:
            batch = tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            return self.forward(batch["input_ids"], batch["attention_mask"])[:, 0].cpu()

        return step


class Packed(Runner):
    """A model that takes sequences end to end, without padding.

    most_tokens: how many it is given at once when the batch may be split.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        device: torch.device,
        attention: str,
        most_tokens: int,
    ):
        super().__init__(device, attention)
        self.forward, self.most_tokens = forward, most_tokens

    def inputs(self, sequences: Sequences, together: bool = True) -> list[Any]:
        """One packed batch, or several as `Encoder` splits them."""
        groups = [sequences]
        if not together:
            batches = token_budget_batches([len(ids) for ids in sequences], self.most_tokens)
            groups = [[sequences[index] for index in batch] for batch in batches]
        return [pack(group).to(self.device) for group in groups]

    def run(self, inputs: list[Any]) -> Tensor:
        """(tokens, dim) final hidden states of the last batch; the others' are dropped."""
        for batch in inputs:
            hidden = self.forward(batch)
        return hidden

    def hidden(self, sequences: Sequences) -> list[Tensor]:
        return list(self.run(self.inputs(sequences)).split([len(ids) for ids in sequences]))

    def from_strings(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Step:
        def step() -> Tensor:
            (batch,) = self.inputs(tokenizer(texts)["input_ids"])
            return self.forward(batch)[batch.cu_seqlens[:-1].long()].cpu()

        return step


class Ours(Packed):
    """This package's model, and for queries and from strings its `Encoder`.

    cuda_graphs: whether queries are replayed CUDA graphs.
    """

    def __init__(self, model: NeoBERT, cuda_graphs: bool = False):
        def forward(batch: PackedBatch) -> Tensor:
            return model(**batch.inputs()).last_hidden_state[0]

        device = model.device
        super().__init__(forward, device, "varlen_attention", MAX_TOKENS[device.type])
        self.model = model.eval()
        self.cuda_graphs = cuda_graphs

    def query(self, sequences: Sequences) -> Step:
        """As a service runs it, from ids on the host to pooled vectors on the device."""
        if not self.cuda_graphs:
            return super().query(sequences)
        batch = pack(sequences)
        return lambda: self.encoder.embed(batch, "cls")

    @cached_property
    def encoder(self) -> Encoder:
        tokenizer = made_up_tokenizer(self.model.config.vocab_size)
        return Encoder(self.model, tokenizer, cuda_graphs=self.cuda_graphs)

    def from_strings(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Step:
        encoder = Encoder(self.model, tokenizer)
        return lambda: encoder.encode(texts, pooling="cls", show_progress_bar=False)


def neobert_config(shape: Shape) -> NeoBERTConfig:
    return NeoBERTConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_length=shape.max_length,
    )


def write_checkpoint(directory: Path, shape: Shape) -> None:
    """The NeoBERT that its three rows load. Without the one huge channel of the trained model: it
    would hide the others from a cosine."""
    write_random_checkpoint(directory, neobert_config(shape), outliers=False)


def build(
    contestant: Contestant,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Path | None,
    latency: bool = False,
) -> Runner:
    """The contestant's model, in eval mode on the device.

    checkpoint: a NeoBERT's directory; the other models get random weights, on which their speed
        does not depend.
    latency: it is to answer single queries: where torch.compile is used on a GPU it then uses CUDA
        graphs.
    """
    if contestant.variant == "transformers":
        return build_transformers(contestant.shape, device, dtype)
    if checkpoint is None:
        raise ValueError(f"{contestant.name} needs a checkpoint, got None")
    if contestant.variant == "ours":
        model = NeoBERT.from_pretrained(checkpoint, dtype=dtype).to(device)
        return Ours(model, cuda_graphs=device.type == "cuda")
    plain: Any = PlainNeoBERT.load(checkpoint, dtype).to(device)
    if contestant.variant == "plain":
        return Padded(plain, device, "sdpa")
    # One compilation serves all shapes: a static one for each would take a minute per batch size.
    mode = "reduce-overhead" if latency and device.type == "cuda" else None
    compiled = torch.compile(plain, dynamic=True, mode=mode)
    return Padded(compiled, device, "sdpa, CUDA graphs" if mode else "sdpa")


def build_transformers(shape: Shape, device: torch.device, dtype: torch.dtype) -> Runner:
    attention = best_attention(shape, device, dtype)
    with device:
        model = _transformers_model(shape, attention, dtype).eval()
    if attention == "sdpa":

        def padded(input_ids: Tensor, mask: Tensor | None) -> Tensor:
            return model(input_ids=input_ids, attention_mask=mask).last_hidden_state

        return Padded(padded, device, "sdpa")

    # RoBERTa's first position is the one after its padding id.
    first = model.config.pad_token_id + 1 if shape.family == "roberta" else 0

    def packed(batch: PackedBatch) -> Tensor:
        output = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None] + first,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        return output.last_hidden_state[0]

    return Packed(packed, device, f"{attention}, packed", MAX_TOKENS[device.type])


def best_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The name that transformers knows it by.

    On a GPU in half precision the packed path: flash-attention where it is installed, else
    torch's own varlen_attn, whose kernels are FlashAttention-2's, if this torch's has the window
    that the model needs. Otherwise SDPA, padded.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    return VARLEN if windowed or shape.window is None else "sdpa"


VARLEN = "varlen_attn"


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over torch.nn.attention.varlen.varlen_attn.

    query, key, value: (1, heads, tokens, head_dim); returns (1, tokens, heads, head_dim).
    sliding_window: one more than the tokens to either side, as ModernBERT passes it.
    """
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    window: dict[str, Any] = {}
    if sliding_window is not None:
        window = {"window_size": (sliding_window - 1, sliding_window - 1)}
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    out: Any = varlen_attn(q, k, v, *lengths, **window)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention_forward)


def _transformers_model(shape: Shape, attention: str, dtype: torch.dtype) -> Any:
    common: dict[str, Any] = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_length,
    )
    cls: Any
    config: Any
    without_pooler = {"add_pooling_layer": False}
    if shape.family == "bert":
        cls, config = BertModel, BertConfig(**common)
    elif shape.family == "roberta":
        common |= dict(
            max_position_embeddings=shape.max_length + 2, type_vocab_size=1, layer_norm_eps=1e-5
        )
        cls, config = RobertaModel, RobertaConfig(**common)
    elif shape.family == "nomic_bert":
        cls, config = NomicBertModel, NomicBertConfig(**common)
    elif shape.family == "modernbert":
        common |= {f"{name}_token_id": None for name in ("eos", "bos", "cls", "sep")}
        common |= dict(
            pad_token_id=0,
            local_attention=2 * (shape.window or 0),
            global_attn_every_n_layers=shape.global_every,
        )
        cls, config, without_pooler = ModernBertModel, ModernBertConfig(**common), {}
    else:
        raise ValueError(f"family must be one of transformers' encoders, got {shape.family!r}")
    return cls._from_config(config, attn_implementation=attention, dtype=dtype, **without_pooler)


@torch.inference_mode()
def worst_cosines(runner: Runner, checkpoint: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Of all tokens of a ragged batch, the smallest cosine to float32 plain PyTorch's hidden
    state: the runner's, and that of plain PyTorch in the same dtype."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 130, 7, 64, 33]
    plain = PlainNeoBERT.load(checkpoint).to(runner.device)
    vocab = plain.decoder.out_features
    sequences = [torch.randint(5, vocab, (n,), generator=generator).tolist() for n in lengths]

    def hidden_of(model: Runner) -> Tensor:
        return torch.cat(model.hidden(sequences)).float()

    truth = hidden_of(Padded(plain, runner.device, "sdpa"))
    yardstick = hidden_of(Padded(plain.to(dtype), runner.device, "sdpa"))
    candidate = hidden_of(runner)
    # float64, for the cosine's own rounding is as large as the difference in float32.
    worst = [
        F.cosine_similarity(x.double(), truth.double(), dim=1).amin().item()
        for x in (candidate, yardstick)
    ]
    return worst[0], worst[1]


def passes_parity(cosine: float, plain_cosine: float, dtype: torch.dtype) -> bool:
    """As for every op: at most twice the error of plain PyTorch in this dtype, and one rounding
    step. A cosine of NaN does not pass."""
    return 1 - cosine <= 2 * (1 - plain_cosine) + torch.finfo(dtype).eps
