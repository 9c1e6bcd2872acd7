"""neobert.encode: the vectors, their order, the texts it must refuse, and what it leaves behind."""

import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from neobert.encode import Encoder, TruncationWarning
from neobert.packing import pack
from neobert.sentence_folder import write_sentence_folder
from tests.tiny import HIDDEN_SIZE, MAX_LENGTH, texts, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = texts()
SHORT = [text[:60] for text in TEXTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def encoder(checkpoint):
    return Encoder.from_pretrained(checkpoint, device="cpu")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def tokenizing_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("neobert-tokenize")]


@pytest.mark.filterwarnings("ignore::neobert.encode.TruncationWarning")
@pytest.mark.parametrize("max_tokens", [1, 200, None])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_those_of_the_padded_model(encoder, checkpoint, pooling, normalize, max_tokens):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    inputs = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
    if normalize:
        expected = torch.nn.functional.normalize(expected, dim=-1)
    actual = encoder.encode(TEXTS, pooling, normalize, max_tokens=max_tokens)
    assert actual.shape == (len(TEXTS), HIDDEN_SIZE) and actual.dtype == np.float32
    close(actual, expected.numpy())


def test_one_at_a_time_gives_the_same_vectors_in_the_same_order(encoder):
    together = encoder.encode(SHORT, max_tokens=100)
    alone = np.stack([encoder.encode(text) for text in SHORT])
    close(together, alone)
    # Neighbours differ by far more than the tolerance, so a wrong order could not pass.
    assert np.abs(np.diff(alone, axis=0)).max(1).min() > 1e-2 * np.abs(alone).max()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("prompt", [None, "query: "])
def test_sentence_transformers_gives_the_same_vectors(encoder, checkpoint, pooling, prompt):
    transformer = Transformer(checkpoint)
    assert transformer.max_seq_length == MAX_LENGTH
    model = SentenceTransformer(
        modules=[transformer, Pooling(HIDDEN_SIZE, pooling_mode=pooling)], device="cpu"
    )
    expected = model.encode(TEXTS, prompt=prompt, normalize_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        actual = encoder.encode(TEXTS, pooling, normalize=True, prompt=prompt)
    close(actual, expected)


def test_prompt_is_put_before_the_text(encoder):
    expected = encoder.encode(["query: " + text for text in SHORT])
    close(encoder.encode(SHORT, prompt="query: "), expected)
    assert np.abs(encoder.encode(SHORT) - expected).max() > 1e-2


def test_truncation_is_counted_and_warned_of_once(encoder):
    lengths = [len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS]
    over = sum(length > 20 for length in lengths)
    assert 0 < over < len(TEXTS)
    with pytest.warns(
        TruncationWarning, match=f"{over} of {len(TEXTS)} texts .*max_length=20"
    ) as w:
        actual = encoder.encode(TEXTS, max_length=20, max_tokens=64)
    assert len(w) == 1 and w[0].filename == __file__
    assert encoder.stats.truncated == over
    assert encoder.stats.texts == len(TEXTS)
    assert encoder.stats.tokens == sum(min(length, 20) for length in lengths)
    kept = encoder.tokenizer(TEXTS, truncation=True, max_length=20)["input_ids"]
    with torch.no_grad():
        expected = [
            encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            for ids in kept
        ]
    close(actual, torch.stack(expected).numpy())


def test_nothing_is_warned_of_when_nothing_is_truncated(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(SHORT)
    assert encoder.stats.truncated == 0


def test_max_length_of_the_encoder_is_the_default(checkpoint):
    encoder = Encoder.from_pretrained(checkpoint, device="cpu", max_length=10)
    with pytest.warns(TruncationWarning, match="max_length=10"):
        encoder.encode(TEXTS[0])
    assert encoder.stats.tokens == 10


def test_a_sentence_transformers_folder_says_how_unless_told_otherwise(tmp_path):
    """Its pooling, length, normalization and default prompt, as sentence-transformers has them."""
    folder = write_tiny_checkpoint(tmp_path / "model")
    write_sentence_folder(folder, HIDDEN_SIZE, 12, {"query": "find: ", "document": "text: "})
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs[1].pooling_mode = "cls"
    theirs.append(Normalize())
    theirs.default_prompt_name = "document"
    theirs.save(str(tmp_path / "saved"))
    expected = theirs.encode(TEXTS)

    encoder = Encoder.from_pretrained(tmp_path / "saved", device="cpu")
    with pytest.warns(TruncationWarning, match="max_length=12"):
        close(encoder.encode(TEXTS), expected)
    short = pack([encoder.tokenizer(text)["input_ids"] for text in ("text: a", "text: b c")])
    close(encoder.embed(short).numpy(), theirs.encode(["a", "b c"]))
    with pytest.warns(TruncationWarning, match="max_length=12"):
        found = encoder.encode(TEXTS, prompt=encoder.folder.prompts["query"])
        close(found, theirs.encode(TEXTS, prompt_name="query"))

    plain = Encoder(encoder.model, encoder.tokenizer)
    assert (plain.max_length, encoder.folder.pooling) == (MAX_LENGTH, "cls")
    given = dict(pooling="mean", normalize=False, prompt="", max_length=MAX_LENGTH)
    with pytest.warns(TruncationWarning, match=f"max_length={MAX_LENGTH}"):
        np.testing.assert_array_equal(encoder.encode(TEXTS, **given), plain.encode(TEXTS))
    assert Encoder.from_pretrained(tmp_path / "saved", max_length=50).max_length == 50


def test_no_texts(encoder):
    empty = encoder.encode([])
    assert empty.shape == (0, HIDDEN_SIZE) and empty.dtype == np.float32
    assert encoder.stats.texts == encoder.stats.tokens == 0
    assert encoder.encode([], convert_to_tensor=True).shape == (0, HIDDEN_SIZE)
    assert list(encoder.encode_stream(iter([]))) == []


def test_the_empty_text_is_its_special_tokens(encoder):
    vector = encoder.encode("")
    assert encoder.stats.tokens == 2
    with torch.no_grad():
        hidden = encoder.model(input_ids=torch.tensor([[101, 102]])).last_hidden_state[0]
    close(vector, hidden.mean(0).numpy())
    close(encoder.encode(["some text", "", ""])[1:], np.stack([vector, vector]))


def test_one_text_gives_one_vector(encoder):
    vector = encoder.encode("some text")
    assert vector.shape == (HIDDEN_SIZE,)
    close(encoder.encode(["some text"]), vector[None])
    tensor = encoder.encode("some text", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (HIDDEN_SIZE,)


def test_tensors_can_be_used_in_autograd(encoder):
    vectors = encoder.encode(SHORT[:3], convert_to_tensor=True)
    assert vectors.dtype == torch.float32 and vectors.device == encoder.device
    weight = torch.ones(HIDDEN_SIZE, requires_grad=True)
    (vectors @ weight).sum().backward()
    close(weight.grad.numpy(), vectors.sum(0).numpy())


def test_inference_mode_does_not_leak_into_the_caller(encoder):
    for rows in encoder.encode_stream(SHORT, max_tokens=20):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert not rows.is_inference()


@pytest.mark.parametrize("container", [tuple, iter, np.array, lambda x: (t for t in x)])
def test_any_iterable_of_texts(encoder, container):
    close(encoder.encode(container(SHORT)), encoder.encode(SHORT))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", None, "b"], r"texts\[1\] must be a str, got NoneType: None"),
        (["a", "b", 3.5], r"texts\[2\] must be a str, got float: 3.5"),
        ([b"a"], r"texts\[0\] must be a str, got bytes"),
        (("a" if i != 5 else None for i in range(9)), r"texts\[5\] must be a str"),
        (None, "texts must be a list or another iterable of str, got <class 'NoneType'>"),
        (b"text", "texts must be .* got <class 'bytes'>"),
        ({"text": "a"}, "texts must be .* got <class 'dict'>"),
    ],
)
def test_what_is_not_text_is_refused_by_index(encoder, given, message):
    with pytest.raises(TypeError, match=message):
        encoder.encode(given)


def test_a_text_that_is_not_unicode_is_named_wherever_it_is(encoder):
    given = [*TEXTS, "half a pair: \ud800"]
    with pytest.raises(ValueError, match=rf"texts\[{len(TEXTS)}\] is not valid Unicode"):
        encoder.encode(given, max_tokens=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be 'mean' or 'cls', got 'max'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_length": 2}, "max_length must be between 3 .* and 96 .*, got 2"),
        ({"max_length": 97}, "max_length must be between 3 .* and 96 .*, got 97"),
    ],
)
def test_options_are_checked_before_anything_is_read(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode_stream(iter([None]), **options)
    with pytest.raises(ValueError, match=message):
        encoder.encode(SHORT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "abacus"}, "device must be one of cpu, cuda, got abacus"),
        ({"max_length": 4096}, "max_length must be between 3 .* and 96 .*, got 4096"),
    ],
)
def test_loading_options_are_checked(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(checkpoint, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match=r"device is cuda:0, but torch .* finds no GPU"):
        Encoder.from_pretrained(checkpoint, device="cuda:0")


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder.tokenizer.name_or_path)
    tokenizer.add_tokens([f"<new{index}>" for index in range(2000)])
    with pytest.raises(ValueError, match=r"tokenizer has \d+ ids, but the model .* for 1000"):
        Encoder(encoder.model, tokenizer)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_low_precision_gives_nearly_the_same_vectors_in_float32(encoder, checkpoint, dtype):
    low = Encoder.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    assert low.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    actual = low.encode(SHORT, normalize=True)
    assert actual.dtype == np.float32
    cosine = (actual * encoder.encode(SHORT, normalize=True)).sum(1)
    assert cosine.min() > 0.999


def test_a_stream_reads_no_more_than_a_group_ahead(encoder):
    read = []

    def endless():
        while True:
            read.append(1)
            yield SHORT[len(read) % len(SHORT)]

    stream = encoder.encode_stream(endless(), max_tokens=128)
    seen, rows = 0, []
    for _ in range(3):
        rows.append(next(stream))
        seen += len(rows[-1])
        assert seen < len(read) <= 4 * seen  # a group ahead, and groups at most double
    stream.close()
    assert not tokenizing_threads()
    expected = [SHORT[(index + 1) % len(SHORT)] for index in range(seen)]
    close(torch.cat(rows).numpy(), encoder.encode(expected))


def test_tokenizing_runs_in_the_background_of_the_computation(encoder, monkeypatch):
    tokenize, forward = encoder._tokenize, encoder.model.forward
    second_tokenized = threading.Event()
    calls = []

    def tokenize_spy(*arguments):
        assert threading.current_thread() is not threading.main_thread()
        calls.append(1)
        if len(calls) == 2:
            second_tokenized.set()
        return tokenize(*arguments)

    def forward_spy(*arguments, **kwargs):
        assert second_tokenized.wait(30), "the second group waits for the first to be computed"
        return forward(*arguments, **kwargs)

    monkeypatch.setattr(encoder, "_tokenize", tokenize_spy)
    monkeypatch.setattr(encoder.model, "forward", forward_spy)
    encoder.encode(SHORT, max_tokens=64)
    assert len(calls) > 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["tokenizer", "model", "texts"])
def test_errors_reach_the_caller_and_leave_no_thread(encoder, monkeypatch, error, where):
    calls = []

    def fail_second(function):
        def spy(*arguments, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise error("on purpose")
            return function(*arguments, **kwargs)

        return spy

    given = SHORT
    if where == "tokenizer":
        monkeypatch.setattr(encoder, "_tokenize", fail_second(encoder._tokenize))
    elif where == "model":
        monkeypatch.setattr(encoder.model, "forward", fail_second(encoder.model.forward))
    else:
        given = map(fail_second(str), SHORT)
    with pytest.raises(error, match="on purpose"):
        for _ in encoder.encode_stream(given, max_tokens=64):
            pass
    assert not tokenizing_threads()
    monkeypatch.undo()
    assert encoder.encode(SHORT).shape == (len(SHORT), HIDDEN_SIZE)  # and it works again
    assert not tokenizing_threads()


def test_progress_bar_shows_texts_and_live_tokens_per_second(encoder, capsys, monkeypatch):
    encoder.encode(SHORT, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert f"{len(SHORT)}/{len(SHORT)}" in shown and "tok/s" in shown
    encoder.encode(SHORT, show_progress_bar=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    encoder.encode(SHORT)
    assert capsys.readouterr().err == ""
