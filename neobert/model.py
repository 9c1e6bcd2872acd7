"""NeoBERT (Le Breton et al. 2025) on packed tensors: the encoder and its heads.

A drop-in for the classes of `chandar-lab/NeoBERT`: it loads the released checkpoint unchanged and
answers to transformers' Auto classes once this module is imported. Padded input is packed once at
the door and unpacked once at the end; in between no tensor holds padding.

(No `from __future__ import annotations` here: transformers reads annotations of model classes.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from neobert.config import NeoBERTConfig
from neobert.door import (
    check_tokens_to_keep,
    first_tokens,
    input_layout,
    one_row_per_sequence,
    packed_boundaries,
)
from neobert.layers import NeoBERTBlock, RMSNorm, RotaryTable, is_bare
from neobert.packing import pack_padded, unpack_padded
from neobert_kernels import linear_cross_entropy, unchecked
from neobert_kernels._checks import check_dtype


class NeoBERTPreTrainedModel(PreTrainedModel):
    """What every NeoBERT class shares: names, initialisation, and strict loading."""

    config_class = NeoBERTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # "sdpa" and "eager" are accepted and mean the same: attention is always varlen_attention.
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["NeoBERTBlock"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^(decoder|dense|classifier|qa_outputs)\."]  # noqa: RUF012
    # Tensors that a checkpoint may lack, because fine-tuning starts from new ones.
    _new_head_modules: tuple[str, ...] = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Uniform weights as in the paper; transformers' functions leave loaded tensors alone."""
        if isinstance(module, nn.Embedding):
            bound = self.config.embedding_init_range
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.Linear):
            if module in [getattr(self, name) for name in self._new_head_modules]:
                init.normal_(module.weight, 0.0, self.config.classifier_init_range)
            else:
                bound = self.config.decoder_init_range
                init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryTable):
            module.fill()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As transformers', but a checkpoint that lacks a tensor, or has one of another shape, is
        an error that names it: a randomly initialised layer is a silent wrong answer.

        The new head of a classifier may be missing. `ignore_mismatched_sizes=True` allows other
        shapes (a head with another number of labels).
        """
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        model, info = loaded
        heads = tuple(f"{name}." for name in cls._new_head_modules)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(heads))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the tensors of "
                f"{cls.__name__}: {', '.join(missing)}"
            )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}: "
                + "; ".join(
                    f"{name} is {tuple(found)} in the checkpoint and {tuple(expected)} in the model"
                    for name, found, expected in sorted(info["mismatched_keys"])
                )
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> Any:
        return self.base_model.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.encoder = value


class NeoBERT(NeoBERTPreTrainedModel):
    """The encoder: token embedding, pre-norm blocks, final RMSNorm.

    fused_epilogues: whether blocks are computed with their norms, rotation, SwiGLU and residual
        adds in the GEMMs' epilogues; `neobert.fused.fuse_epilogues` sets it.
    """

    fused_epilogues = False

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary = RotaryTable(config)
        self.transformer_encoder = nn.ModuleList(
            NeoBERTBlock(config) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        tokens_to_keep: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode padded or packed sequences.

        Args:
            input_ids: (batch, length) integer ids; packed, (1, tokens).
            attention_mask: None, or (batch, length) bool, integer or float, 1 to keep and 0 for
                padding, which may lie anywhere. A row of padding only is legal.
            position_ids: (batch, length), or (1, length) for all rows. By default the column
                number (padded) or the place in the sequence (packed). Only differences matter.
            inputs_embeds: (batch, length, hidden_size), in place of input_ids.
            cu_seqlens: (sequences + 1,) int32. Given with max_seqlen, the input is packed:
                sequence i is tokens cu_seqlens[i]:cu_seqlens[i+1]. Also `cu_seq_lens_q`.
            max_seqlen: longest length in tokens, a Python int. Also `max_length_q`.
            output_hidden_states: also return num_hidden_layers + 1 tensors: the embedding, the
                output of each block but the last, and last_hidden_state. (The hub's code returns
                the outputs of all blocks, without the embedding and before the final norm.)
            output_attentions: also return each layer's attention probabilities, by a slow path
                that holds (batch, heads, length, length) in memory.
            tokens_to_keep: (kept,) int64, with packed input: the only tokens whose last hidden
                state is wanted, in this order. What the last block does after its attention, three
                quarters of its products, is then done for these alone.

        Anything else, as a tokenizer's token_type_ids, is ignored.

        Returns:
            BaseModelOutput with last_hidden_state (batch, length, hidden_size), zeros at padding;
            packed, (1, tokens, hidden_size), or (1, kept, hidden_size).

        Raises:
            ValueError: arguments that contradict one another; a sequence longer than
                config.max_length; an attention_mask that is not a 2-D keep-mask; position_ids that
                restart in a row whose sequences nothing else separates; tokens_to_keep of another
                shape or dtype, or beside padded input.
            IndexError: a token id, a position or a token to keep outside its table (CPU).
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        packed = packed_boundaries(cu_seqlens, max_seqlen, kwargs)
        layout, positions = input_layout(
            inputs, attention_mask, position_ids, packed, self.config.max_length
        )
        if tokens_to_keep is not None:
            check_tokens_to_keep(tokens_to_keep, inputs, packed)
        hidden = pack_padded(inputs, layout)
        if inputs_embeds is None:
            hidden = self.encoder(hidden)
        check_dtype("NeoBERT", embeddings=hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions

        states, attentions = [], []
        rotary = self.rotary.cos, self.rotary.sin, positions
        last = len(self.transformer_encoder) - 1
        squares = unchecked.sum_of_squares(hidden.detach()) if self.fused_epilogues else None
        for number, block in enumerate(self.transformer_encoder):
            if output_hidden_states:
                states.append(unpack_padded(hidden, layout))
            if output_attentions:
                attentions.append(block.attention_probabilities(hidden, *rotary, layout))  # type: ignore[operator]
            keep = tokens_to_keep if number == last else None
            hidden = block(hidden, *rotary, layout.cu_seqlens, layout.max_seqlen, keep, squares)
            if squares is not None:
                hidden, squares = hidden
        hidden = self.layer_norm(hidden)
        hidden = hidden[None] if packed is not None else unpack_padded(hidden, layout)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class NeoBERTLMHead(NeoBERTPreTrainedModel):
    """Masked-language model: the encoder and an untied, biased projection to the vocabulary."""

    _tied_weights_keys = {"decoder.weight": "model.encoder.weight"}  # noqa: RUF012

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_logits: bool | str | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Logits, or with labels the loss.

        Args:
            labels: (batch, length) int64, the id to predict or -100 for none; packed, (1, tokens),
                or with tokens_to_keep (1, kept).
            output_logits: whether to compute logits. By default they are made without labels; with
                labels only the loss is, from labelled rows alone, and the logits of the others
                never exist: `config.output_logits` changes this, for a Trainer whose
                compute_metrics needs predictions. "labelled": those of the labelled tokens, without
                gradient, for metrics beside the loss.
            Others: as for `NeoBERT.forward`.

        Returns:
            MaskedLMOutput: loss, float32, the mean over labelled tokens (their sum over
            `num_items_in_batch` if that is given); logits (batch, length, vocab_size), or
            (labelled tokens, vocab_size), or None; with tokens_to_keep, (1, kept, vocab_size).
        """
        output = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden = output.last_hidden_state
        if output_logits is None:
            output_logits = labels is None or self.config.output_logits
        loss = None
        if labels is not None:
            loss = self._loss(hidden, labels, kwargs.get("num_items_in_batch"))
        logits = None
        if output_logits == "labelled" and labels is not None:
            with torch.no_grad():
                logits = self.decoder(hidden[labels != -100])
        elif output_logits:
            logits = self.decoder(hidden)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _loss(self, hidden: Tensor, labels: Tensor, num_items_in_batch) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"labels must be {tuple(hidden.shape[:2])}, one per token, got "
                f"{tuple(labels.shape)}"
            )
        hidden, labels = hidden.flatten(0, 1), labels.to(hidden.device).flatten()
        labelled = labels != -100
        if not is_bare(self.decoder, nn.Linear) or hasattr(self, "_loss_function"):
            return self.loss_function(
                self.decoder(hidden[labelled]),
                labels[labelled],
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        loss = linear_cross_entropy(hidden, self.decoder.weight, self.decoder.bias, labels)
        if num_items_in_batch is not None:
            count = labelled.sum()
            loss = torch.where(count > 0, loss * count, 0.0) / num_items_in_batch
        return loss


class NeoBERTForSequenceClassification(NeoBERTPreTrainedModel):
    """One prediction per sequence, from its first token: dense, tanh, classifier."""

    _new_head_modules = ("dense", "classifier")

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # never None here
        self.model = NeoBERT(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (batch, num_labels), or (sequences, num_labels) for packed input.

        labels: (batch,) int64 class numbers, (batch,) or (batch, num_labels) float regression
        targets, or (batch, num_labels) float for several labels each; config.problem_type decides
        where the shapes do not. Other arguments as for `NeoBERT.forward`.
        """
        output = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        first = first_tokens(output.last_hidden_state, attention_mask, kwargs)
        first = torch.tanh(self.dense(self.dropout(first)))
        logits = self.classifier(self.dropout(first))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class NeoBERTForTokenClassification(NeoBERTPreTrainedModel):
    """One prediction per token."""

    _new_head_modules = ("classifier",)

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # never None here
        self.model = NeoBERT(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Logits (batch, length, num_labels); packed, (1, tokens, num_labels).

        labels: (batch, length) int64, -100 for none. Other arguments as for `NeoBERT.forward`.
        """
        output = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class NeoBERTForQuestionAnswering(NeoBERTPreTrainedModel):
    """Where an answer starts and ends in its sequence."""

    _new_head_modules = ("qa_outputs",)

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """start_logits and end_logits (batch, length), the lowest float at padding: no answer is
        there. For packed input they are (sequences, max_seqlen), one row per sequence.

        start_positions, end_positions: (batch,) or (sequences,) int64, the answer's first and last
        token, counted from the row's first column; outside it, the row has no loss. Other
        arguments as for `NeoBERT.forward`.
        """
        output = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.qa_outputs(output.last_hidden_state)
        logits = one_row_per_sequence(logits, attention_mask, kwargs)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                start_logits, end_logits, start_positions, end_positions, **kwargs
            )
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


NeoBERTModel = NeoBERT
NeoBERTForMaskedLM = NeoBERTLMHead

# A class registered here wins over the remote code that a checkpoint's auto_map names, even under
# trust_remote_code=True.
AutoConfig.register("neobert", NeoBERTConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, NeoBERT),
    (AutoModelForPreTraining, NeoBERTLMHead),
    (AutoModelForMaskedLM, NeoBERTLMHead),
    (AutoModelForSequenceClassification, NeoBERTForSequenceClassification),
    (AutoModelForTokenClassification, NeoBERTForTokenClassification),
    (AutoModelForQuestionAnswering, NeoBERTForQuestionAnswering),
):
    _auto_class.register(NeoBERTConfig, _model_class, exist_ok=True)
