"""neobert.text: the ids of the whole text, whatever is cut off before tokenizing."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from neobert import text as text_module
from neobert.docstrings import docstrings
from neobert.text import TextTokenizer
from neobert.wordpiece import train_tokenizer

# What could make a piece's ids differ from the whole's, or make many characters few tokens.
FRAGMENTS = [
    "the", "function", "Unhappily", "re", "x", "0xff", "don't", "e\u0301", "\u0301", "\u00e9",
    "\ufb01", "\u03a3", "\u0391\u03a3", "\u4e2d\u6587", "\u3002", "\uff0c", "\u3001", "\u3000",
    " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\u200d", "\x00", "\x1c", "\ufffd",
    "a" * 101, "-" * 30, " " * 60, ".", ",", "_", "'", "\u0345", "\u0327", "\U0001f600",
    "[SEP]", "[MASK]", "[unused3]", "[CLS", "##ing", "\uac00", "\u1100\u1161", "\u0130", "\u00df",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    texts = docstrings(Path(text_module.__file__).parent)
    return train_tokenizer([*texts, *FRAGMENTS], vocab_size=800)


def whole(tokenizer, text, max_length):
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]


def test_special_tokens_have_the_ids_of_bert(tokenizer):
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 100, 101, 102, 103]
    assert tokenizer("")["input_ids"] == [101, 102]


@pytest.mark.parametrize("max_length", [3, 8, 40])
def test_ids_of_pieces_are_the_ids_of_the_whole_text(tokenizer, monkeypatch, max_length):
    monkeypatch.setattr(text_module, "SHORTEST_PIECE", 1)
    monkeypatch.setattr(text_module, "CHARACTERS_PER_TOKEN", 1)
    tokenize = TextTokenizer(tokenizer)
    assert tokenize.can_cut
    generator = random.Random(max_length)
    texts = ["".join(generator.choices(FRAGMENTS, k=generator.randint(0, 120))) for _ in range(400)]
    expected = [whole(tokenizer, text, max_length) for text in texts]
    ids, truncated = tokenize(texts, max_length)
    assert ids == expected
    assert truncated == sum(len(tokenizer(text)["input_ids"]) > max_length for text in texts)
    assert 0 < truncated < len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 40_000,
        " " * 100_000 + "two words",
        "a" * 100_000 + " word",
        "a" * 100_000,
        "\u4e2d" * 10_000 + "\u3002",
        "x " * 510 + " " * 100_000,
        "x " * 510 + " " * 100_000 + "x",
    ],
    ids=["words", "spaces", "unk", "no-boundary", "cjk", "exactly-full", "one-too-many"],
)
def test_long_texts(tokenizer, text):
    ids, truncated = TextTokenizer(tokenizer)([text], 512)
    assert ids == [whole(tokenizer, text, 512)]
    assert truncated == (len(tokenizer(text)["input_ids"]) > 512)


def test_a_long_text_is_not_tokenized_whole(tokenizer):
    tokenize = TextTokenizer(tokenizer)
    seen = []

    class Spy:
        def encode_batch_fast(self, texts, add_special_tokens):
            seen.extend(map(len, texts))
            return tokenizer.backend_tokenizer.encode_batch_fast(
                texts, add_special_tokens=add_special_tokens
            )

    tokenize.backend = Spy()
    ids, truncated = tokenize(["some words " * 100_000], 128)
    assert truncated == 1 and len(ids[0]) == 128
    assert sum(seen) <= 1024


def test_the_given_tokenizer_is_not_changed(tokenizer):
    text = "one two three four five six seven"
    expected = tokenizer(text)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    ids, truncated = TextTokenizer(tokenizer)([text], 400)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    assert tokenizer.backend_tokenizer.padding["length"] == 7
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert ids == [expected] and truncated == 0


def test_a_tokenizer_that_looks_across_words_is_never_cut():
    backend = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenize = TextTokenizer(tokenizer)
    assert not tokenize.can_cut
    assert tokenize(["a " * 100_000], 5) == ([[1] * 5], 1)


def test_an_added_token_with_a_space_is_never_cut(tokenizer):
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        extra_special_tokens=["[two words]"],
    )
    tokenize = TextTokenizer(copy)
    assert not tokenize.can_cut
    ids, _ = tokenize(["a [two words] b"], 20)
    assert copy.convert_tokens_to_ids("[two words]") in ids[0]


def test_max_length_without_room_for_a_token(tokenizer):
    with pytest.raises(ValueError, match="max_length must exceed the 2 special tokens, got 2"):
        TextTokenizer(tokenizer)(["text"], 2)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(TypeError, match="fast tokenizer"):
        TextTokenizer(object())
