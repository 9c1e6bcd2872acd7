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
    """Norm gains around 1, embeddings in ± 1, projections that keep that size; those that write to
    the residual stream are smaller, so that depth does not drown the embedding."""
    x = torch.rand(shape, generator=generator) - 0.5
    if name.endswith("norm.weight"):
        return 1 + x
    if name == "model.encoder.weight":
        return 2 * x
    scale = 1 if ".wo." in name or ".w3." in name else 2
    return x * scale * shape[-1] ** -0.5


def _add_outlier(state: dict[str, Tensor], config: NeoBERTConfig) -> None:
    """One channel as found in the released weights: 7.6 on every token, and, four sevenths of the
    way up, a layer that turns it into about -1,330. As in the trained model, the norms' gains then
    make the other channels audible again, but by half: the gated product, whose input is no longer
    normalised, would feed on itself."""
    channel = config.hidden_size * 184 // 768
    turn = config.num_hidden_layers * 4 // 7
    loudness = 1330 / config.hidden_size**0.5  # of a token, root mean square, from there on
    state["model.encoder.weight"][:, channel] = 7.6
    for i in range(config.num_hidden_layers):
        layer = f"model.transformer_encoder.{i}"
        state[f"{layer}.wo.weight"][channel] = 0
        state[f"{layer}.ffn.w3.weight"][channel] = 0
        if i > turn:
            for norm in ("attention_norm", "ffn_norm"):
                state[f"{layer}.{norm}.weight"] *= loudness / 2
                state[f"{layer}.{norm}.weight"][channel] = 0.02
    state["model.layer_norm.weight"] *= loudness
    state["model.layer_norm.weight"][channel] = 4.7

    layer = f"model.transformer_encoder.{turn}"
    state[f"{layer}.ffn_norm.weight"][channel] = 1
    after_norm = 7.6 / (7.6**2 / config.hidden_size + 0.5) ** 0.5
    for row in (0, config.swiglu_width):  # unit 0: its gate and its up
        state[f"{layer}.ffn.w12.weight"][row] = 0
        state[f"{layer}.ffn.w12.weight"][row, channel] = 8 / after_norm
    state[f"{layer}.ffn.w3.weight"][:, 0] = 0
    state[f"{layer}.ffn.w3.weight"][channel, 0] = -1330 / 64
