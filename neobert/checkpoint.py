"""Checkpoints in the released format: its tensor names and shapes, and a random one to work on.

The released checkpoint is `chandar-lab/NeoBERT`; where it cannot be fetched, a random one of the
same size runs through the same code at the same speed.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neobert.config import NeoBERTConfig

# What the released config.json says beside the model's shape. Loading must survive all of it.
_RELEASED_EXTRAS = {
    "architectures": ["NeoBERTLMHead"],
    "auto_map": {
        "AutoConfig": "model.NeoBERTConfig",
        "AutoModel": "model.NeoBERT",
        "AutoModelForMaskedLM": "model.NeoBERTLMHead",
        "AutoModelForSequenceClassification": "model.NeoBERTForSequenceClassification",
    },
    "kwargs": {
        "architectures": ["NeoBERTLMHead"],
        "pretrained_model_name_or_path": "google-bert/bert-base-uncased",
        "trust_remote_code": True,
    },
    "model_type": "neobert",
    "pretrained_model_name_or_path": "google-bert/bert-base-uncased",
    "torch_dtype": "float32",
    "transformers_version": "4.48.2",
    "trust_remote_code": True,
}
_RELEASED_FIELDS = (
    "decoder_init_range",
    "embedding_init_range",
    "hidden_size",
    "intermediate_size",
    "max_length",
    "norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "vocab_size",
)


def released_shapes(config: NeoBERTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in a released checkpoint: 4 + 6 per layer, 172 in all."""
    dim, width, vocab = config.hidden_size, config.swiglu_width, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.encoder.weight": (vocab, dim)}
    for i in range(config.num_hidden_layers):
        layer = f"model.transformer_encoder.{i}"
        shapes[f"{layer}.attention_norm.weight"] = (dim,)
        shapes[f"{layer}.qkv.weight"] = (3 * dim, dim)
        shapes[f"{layer}.wo.weight"] = (dim, dim)
        shapes[f"{layer}.ffn_norm.weight"] = (dim,)
        shapes[f"{layer}.ffn.w12.weight"] = (2 * width, dim)
        shapes[f"{layer}.ffn.w3.weight"] = (dim, width)
    shapes["model.layer_norm.weight"] = (dim,)
    shapes["decoder.weight"] = (vocab, dim)
    shapes["decoder.bias"] = (vocab,)
    return shapes


def write_random_checkpoint(
    directory: str | Path,
    config: NeoBERTConfig | None = None,
    *,
    seed: int = 0,
    outliers: bool = True,
) -> Path:
    """Write config.json and model.safetensors of a random float32 NeoBERT; returns `directory`.

    config: the released shape (245 M parameters, 981 MB) if None.
    outliers: give the residual stream the massive activations of the trained model, about 1,300
        from the middle on and 130 after the final norm, in one channel; everything else stays
        near 1. Low precision has to live with them.
    """
    config = config or NeoBERTConfig()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _random_tensor(name, shape, generator)
        for name, shape in released_shapes(config).items()
    }
    if outliers:
        _add_outlier(state, config)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    fields = {name: getattr(config, name) for name in _RELEASED_FIELDS}
    fields["dim_head"] = config.hidden_size // config.num_attention_heads
    if config.rope_parameters["rope_type"] != "default":
        fields["rope_parameters"] = config.rope_parameters
    text = json.dumps(_RELEASED_EXTRAS | fields, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n")
    return directory


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norm gains around 1, embeddings near ± 1, and projections that keep about that size."""
    x = torch.rand(shape, generator=generator) - 0.5
    if name.endswith("norm.weight"):
        return 1 + x
    if name == "model.encoder.weight":
        return 2 * x
    return x * 2 * shape[-1] ** -0.5


def _add_outlier(state: dict[str, Tensor], config: NeoBERTConfig) -> None:
    """One channel as found in the released weights: a constant 7.6 on every token, and, four
    sevenths of the way up, a layer that turns it into about -1,330. As in the trained model, the
    norms' gains then make the other channels audible again."""
    channel = config.hidden_size * 184 // 768
    layer = config.num_hidden_layers * 4 // 7
    state["model.encoder.weight"][:, channel] = 7.6
    unit, ffn = 0, f"model.transformer_encoder.{layer}.ffn"
    w12, w3 = state[f"{ffn}.w12.weight"], state[f"{ffn}.w3.weight"]
    seen = 7.6 / (7.6**2 / config.hidden_size + 0.5) ** 0.5  # the channel after a norm, about
    state[f"model.transformer_encoder.{layer}.ffn_norm.weight"][channel] = 1
    for row in (unit, unit + config.swiglu_width):  # gate and up
        w12[row] = 0
        w12[row, channel] = 8 / seen
    w3[:, unit] = 0
    w3[channel, unit] = -1330 / 64
    loudness = (1330**2 / config.hidden_size) ** 0.5
    for name, gain in state.items():
        parts = name.split(".")
        after = parts[-2] == "layer_norm" or (
            parts[1] == "transformer_encoder" and (int(parts[2]) > layer)
        )
        if parts[-2].endswith("norm") and after:
            gain *= loudness
            gain[channel] = 4.7 if parts[-2] == "layer_norm" else 0.02
