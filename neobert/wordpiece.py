"""A WordPiece tokenizer like BERT's, trained on the spot."""

from __future__ import annotations

from collections import Counter

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 30522
ALPHABET = 1000  # letters of a tokenizer at most, as BERT's trainer has it
# The first ids of BERT's vocabulary: [PAD] is 0, [UNK] 100, [CLS] 101, [SEP] 102 and [MASK] 103.
UNUSED = [f"[unused{index}]" for index in range(99)]
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def train_tokenizer(
    texts: list[str], vocab_size: int = VOCAB_SIZE, max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, its special tokens at BERT's ids, trained on `texts`.

    Its vocabulary is smaller than `vocab_size` if the texts have too few words for so many. The
    same texts give the same tokenizer.
    """
    learner = Tokenizer(WordPiece(unk_token=SPECIAL["unk"]))
    learner.normalizer = BertNormalizer()
    learner.pre_tokenizer = BertPreTokenizer()
    # The trainer would number the inner letters in the random order of a hash table, and break ties
    # between pairs by those numbers.
    letters = Counter(BertNormalizer().normalize_str("\n".join(texts)))
    common = sorted(letters, key=lambda letter: (-letters[letter], letter))[:ALPHABET]
    inner = [f"##{letter}" for letter in common if not letter.isspace()]
    first = [SPECIAL["pad"], *UNUSED, *list(SPECIAL.values())[1:], *inner]
    learner.train_from_iterator(
        texts,
        WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=first,
            limit_alphabet=ALPHABET,
            show_progress=False,
        ),
    )
    # The trainer made every one of the first ids a special token; only five are.
    tokenizer = Tokenizer(WordPiece(learner.get_vocab(), unk_token=SPECIAL["unk"]))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, learner.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )
