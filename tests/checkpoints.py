"""Small NeoBERT checkpoints and inputs that the model's tests share."""

import random

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from neobert import NeoBERTConfig

WORDS = "the a cat dog sat ran on under mat tree and it was not very red blue old new big".split()


def small_config(**changes) -> NeoBERTConfig:
    """Seven layers, so that the outlier appears in the fifth; four heads of 64."""
    shape = dict(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=7,
        num_attention_heads=4,
        intermediate_size=768,
        max_length=600,
    )
    return NeoBERTConfig(**(shape | changes))


def random_sequences(lengths: list[int], vocab: int = 1000) -> list[list[int]]:
    """Token ids from 1 up: 0 is padding."""
    return [torch.randint(1, vocab, (n,)).tolist() for n in lengths]


def pad(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """ids and mask, (batch, longest + 2); side "right", "left", or "gap": padding in between."""
    width = max(map(len, sequences)) + 2
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        columns = {
            "right": range(n),
            "left": range(width - n, width),
            "gap": sorted(random.Random(row).sample(range(width), n)),
        }[side]
        ids[row, list(columns)] = torch.tensor(sequence)
        mask[row, list(columns)] = 1
    return ids, mask


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like the released one ([PAD] is 0; [CLS] text [SEP]) over a few words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: i for i, token in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
