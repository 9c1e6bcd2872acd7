"""NeoBERT's configuration, as the released checkpoint's config.json has it."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Keys that the released config.json carries although no model reads them. `auto_map` would send
# whoever loads a checkpoint saved from here to a model.py that is not beside it.
_JUNK = ("auto_map", "dim_head", "kwargs", "pretrained_model_name_or_path", "trust_remote_code")


@strict
class NeoBERTConfig(PreTrainedConfig):
    """Shape and numerics of a NeoBERT encoder; the defaults are those of the released checkpoint.

    vocab_size: rows of the token embedding and of the language-model head.
    hidden_size, num_hidden_layers, num_attention_heads: as usual; the heads divide hidden_size.
    intermediate_size: nominal; the SwiGLU width is two thirds of it (see `swiglu_width`).
    max_length: longest sequence in tokens, and the length of the rotary table. transformers and
        sentence-transformers read it as `max_position_embeddings`.
    norm_eps: added to the mean square in every RMSNorm.
    rope_parameters: as in transformers: {"rope_type": "default", "rope_theta": 10000.0}, or
        "linear", "yarn", "llama3", "proportional" with their keys. "dynamic" and "longrope" are
        refused: they would make a text's vector depend on the other texts in its batch.
    embedding_init_range, decoder_init_range: new weights are uniform in ± this (paper, §3).
    classifier_init_range, classifier_dropout: normal standard deviation and dropout of task heads.
    output_logits: whether the masked-language model returns logits beside the loss (see
        `NeoBERTLMHead`).
    """

    model_type = "neobert"
    attribute_map = {"max_position_embeddings": "max_length"}  # noqa: RUF012

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_length: int = 4096
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    rope_parameters: dict = field(default_factory=dict)
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    classifier_init_range: float = 0.02
    classifier_dropout: float | int = 0.1
    tie_word_embeddings: bool = False
    output_logits: bool = False

    def __post_init__(self, **kwargs):
        for key in _JUNK:
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}"
            )

    @property
    def swiglu_width(self) -> int:
        """Width of the gated layer: 2/3 of intermediate_size, rounded up to a multiple of 8."""
        return -(-int(2 * self.intermediate_size / 3) // 8) * 8
