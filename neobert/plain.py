"""NeoBERT in plain PyTorch, padded: the truth in float64, and the baseline in other dtypes.

Written from the checkpoint's description, not from the package: it shares no code with it, not
even the names of its classes. Padded (batch, length, dim) throughout, one attention mask, SDPA.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def rotate_adjacent_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """x (batch, length, heads, head_dim), angles (length, head_dim / 2): turn (x[2i], x[2i+1])."""
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    wide = x.to(angles.dtype)
    a, b = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.reshape(x.shape).to(x.dtype)


class PlainNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PlainFeedForward(nn.Module):
    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class PlainLayer(nn.Module):
    def __init__(self, dim: int, heads: int, width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = PlainNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = PlainNorm(dim, eps)
        self.ffn = PlainFeedForward(dim, width)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        # Each head owns 3 * head_dim neighbouring outputs: its q, then its k, then its v.
        per_head = self.qkv(self.attention_norm(x)).view(batch, length, self.heads, -1)
        q, k, v = per_head.chunk(3, dim=-1)
        q, k = rotate_adjacent_pairs(q, angles), rotate_adjacent_pairs(k, angles)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.wo(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.ffn(self.ffn_norm(x))


class PlainNeoBERT(nn.Module):
    """Same state dict as a released checkpoint (`model.…` and `decoder.…`), any dtype."""

    def __init__(
        self, *, vocab: int, dim: int, layers: int, heads: int, intermediate: int, eps: float
    ):
        super().__init__()
        width = int(2 * intermediate / 3)
        width = 8 * ((width + 7) // 8)
        self.head_dim = dim // heads
        self.model = nn.ModuleDict(
            {
                "encoder": nn.Embedding(vocab, dim),
                "transformer_encoder": nn.ModuleList(
                    PlainLayer(dim, heads, width, eps) for _ in range(layers)
                ),
                "layer_norm": PlainNorm(dim, eps),
            }
        )
        self.decoder = nn.Linear(dim, vocab)

    @classmethod
    def load(cls, directory: Path | str, dtype: torch.dtype = torch.float32) -> "PlainNeoBERT":
        """From a directory with the released config.json and model.safetensors."""
        config = json.loads((Path(directory) / "config.json").read_text())
        with torch.device("meta"):
            plain = cls(
                vocab=config["vocab_size"],
                dim=config["hidden_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                intermediate=config["intermediate_size"],
                eps=config["norm_eps"],
            )
        state = load_file(Path(directory) / "model.safetensors")
        plain.load_state_dict(state, strict=True, assign=True)
        return plain.to(dtype).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, length) ids and keep-mask → (batch, length, dim) final hidden state.

        Values at padding mean nothing. A row needs at least one token.
        """
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        wide = torch.promote_types(self.decoder.weight.dtype, torch.float32)
        pairs = torch.arange(0, self.head_dim, 2, device=input_ids.device, dtype=wide)
        position = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=wide)
        angles = position[:, None] * 10000.0 ** (-pairs / self.head_dim)
        x = self.model["encoder"](input_ids)
        for layer in self.model["transformer_encoder"].children():
            x = layer(x, angles, mask)
        return self.model["layer_norm"](x)
