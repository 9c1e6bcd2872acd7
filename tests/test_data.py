"""The training data: packing efficiency on real text, exact resume, disjoint lanes, mixtures."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from neobert.corpus import Source, open_texts, text_batches
from neobert.data import Corpus, TrainingStream
from neobert.docstrings import docstrings
from neobert.masking import IGNORE_INDEX, Masking
from neobert.randomness import Permutation, random_generator
from neobert.readers import Cut
from neobert.shards import prepare
from neobert.wordpiece import train_tokenizer

LANES = 4


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Not the home directory's."""
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def texts():
    """Docstrings of the standard library's packages: a few words to a few pages each."""
    found = itertools.islice(docstrings(Path(json.__file__).parent.parent), 3000)
    return [" ".join(text.split()) for text in found]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, vocab_size=2000)


@pytest.fixture(scope="module")
def files(texts, tokenizer, tmp_path_factory):
    """The same texts in every form a source may have, by name."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (folder / "all.txt").write_text("\n".join(texts))
    (folder / "all.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "all.txt.gz", "wt") as file:
        file.write("\n".join(texts))
    Dataset.from_dict({"body": texts}).to_parquet(folder / "all.parquet")
    for i in range(6):
        (folder / f"part-{i}.jsonl").write_text("\n".join(lines[i::6]))
    data = Dataset.from_dict({"text": texts})
    prepare(
        folder / "shards",
        lambda position: text_batches(data, "text", position),
        tokenizer,
        {"path": "all"},
        shard_tokens=40_000,
    )
    return folder


def corpus(tokenizer, *sources, max_length=128, split=False, held_out=0):
    return Corpus(sources, tokenizer, Cut(max_length, split), held_out)


def key(sequence):
    return sequence.tobytes()


def numbered(count, lengths=lambda i: 5):
    """Texts that say which document they are, `lengths(i)` tokens long with the special tokens."""
    return [" ".join([f"d{i}", *["x"] * (lengths(i) - 3)]) for i in range(count)]


@pytest.fixture
def numbered_corpus(tmp_path):
    """numbered_corpus(texts, …): a corpus of them, and a function from a sequence to its number."""

    def make(texts, *, name="texts", held_out=0, max_length=64, split=False, **options):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        words = train_tokenizer([" ".join(f"d{i}" for i in range(len(texts))), "x"], 20_000)
        ids = {words.convert_tokens_to_ids(f"d{i}"): i for i in range(len(texts))}
        assert len(ids) == len(texts), "every name must be one token"
        made = corpus(
            words,
            Source(str(path), **options),
            max_length=max_length,
            split=split,
            held_out=held_out,
        )
        return made, lambda sequence: ids[int(sequence[1])]

    return make


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutation(n):
    orders = [Permutation(n, random_generator(seed)) for seed in range(3)]
    places = [[order(i) for i in range(n)] for order in orders]
    assert all(sorted(each) == list(range(n)) for each in places)
    if n >= 64:
        assert places[0] != places[1] != places[2]
        steps = np.diff(places[0])
        assert (steps == 1).mean() < 0.1 and abs(np.corrcoef(places[0], range(n))[0, 1]) < 0.3


@pytest.mark.parametrize("max_length, bin_tokens", [(256, 256), (256, 2048), (1024, 8192)])
@pytest.mark.parametrize("split", [False, True])
def test_packing_efficiency_on_real_text(tokenizer, files, max_length, bin_tokens, split):
    made = corpus(tokenizer, Source(str(files / "all.txt")), max_length=max_length, split=split)
    lane = made.lane(0, 1, bin_tokens, seed=0)
    bins = [lane.next() for _ in range(300_000 // bin_tokens)]
    filled = sum(len(s) for each in bins for s in each) / (len(bins) * bin_tokens)
    assert filled >= 0.98
    longest = [max(map(len, each)) for each in bins]
    assert max(longest) == max_length and max(sum(map(len, each)) for each in bins) <= bin_tokens


@pytest.mark.parametrize("name", ["all.txt", "all.jsonl", "all.txt.gz", "all.parquet", "part-*",
                                  "shards"])  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_every_form_gives_the_same_sequences(texts, tokenizer, files, name, split):
    field = "text" if ".txt" in name or name == "shards" else "body"
    made = corpus(tokenizer, Source(str(files / name), field), split=split)
    found = {
        key(sequence)
        for place in range(0, len(made.opened[0]), 50)
        for each in made.opened[0].sequences(range(place, min(place + 50, len(made.opened[0]))))
        for sequence in each
    }
    expected = set()
    for ids in tokenizer(texts)["input_ids"]:
        body = ids[1:-1]
        for start in range(0, len(body) if split else min(len(body), 1), 126):
            piece = [ids[0], *body[start : start + 126], ids[-1]]
            expected.add(key(np.array(piece, np.int32)))
    assert found == expected


def test_an_epoch_deals_every_document_to_one_lane(numbered_corpus):
    made, number = numbered_corpus(numbered(400))
    dealt = []
    for lane in range(LANES):
        reader = made.lane(lane, LANES, 64, seed=3).readers[0]
        dealt.append([number(reader.next()) for _ in range(200)])  # two epochs
    for epoch in (slice(0, 100), slice(100, 200)):
        assert sorted(n for each in dealt for n in each[epoch]) == list(range(400))
    assert dealt[0][:100] != dealt[0][100:], "the second epoch has another order"
    other = made.lane(0, LANES, 64, seed=4).readers[0]
    assert [number(other.next()) for _ in range(100)] != dealt[0][:100]


def test_a_lane_loses_nothing_between_reader_and_bins(numbered_corpus):
    made, number = numbered_corpus(numbered(500, lambda i: 4 + i % 40))
    lane, reader = made.lane(1, LANES, 64, seed=0), made.lane(1, LANES, 64, seed=0).readers[0]
    packed = [number(s) for _ in range(40) for s in lane.next()]
    read = [number(reader.next()) for _ in range(len(packed) + 200)]
    assert sorted(packed) != packed
    missing = [n for n in read[: len(packed)] if n not in packed]
    assert set(packed) <= set(read)
    assert len(missing) < 64, "only documents of the window under way may be out"


@pytest.mark.parametrize("name", ["all.txt", "shards", "stream", "mixture", "split"])
@pytest.mark.parametrize("used", [0, 1, 9, 70, 71])
def test_resume_gives_the_same_next_bin(tokenizer, files, name, used):
    sources = {
        "all.txt": [Source(str(files / "all.txt"))],
        "split": [Source(str(files / "all.txt"))],
        "shards": [Source(str(files / "shards"), min_tokens=20)],
        "stream": [Source(str(files / "part-*"), "body", streaming=True, min_tokens=12)],
        "mixture": [
            Source(str(files / "all.parquet"), "body", weight=1),
            Source(str(files / "part-*"), "body", weight=2, streaming=True),
            Source(str(files / "shards"), weight=1, min_tokens=100),
        ],
    }[name]
    made = corpus(tokenizer, *sources, split=name == "split")
    lane = made.lane(2, LANES, 512, seed=5)
    for _ in range(used):
        lane.next()
    state = json.loads(json.dumps(lane.state))
    assert len(json.dumps(state)) < 2000
    again = made.lane(2, LANES, 512, 5, state)
    for _ in range(40):
        assert list(map(key, lane.next())) == list(map(key, again.next()))
        assert lane.state == again.state


def test_streamed_files_are_dealt_to_lanes_and_begin_again(texts, tokenizer, files):
    made = corpus(tokenizer, Source(str(files / "part-*"), "body", streaming=True), max_length=512)
    lanes = [made.lane(lane, LANES, 1024, seed=0).readers[0] for lane in range(LANES)]
    six = [set(made.tokenize(texts[i::6], 512)[0][j][1] for j in range(3)) for i in range(6)]
    assert len(six) == 6
    first = {}
    for number, reader in enumerate(lanes):
        files_of_lane = [texts[i::6] for i in range(number, 6, LANES)]
        expected = made.tokenize([t for each in files_of_lane for t in each if t.strip()], 512)[0]
        read = [reader.next().tolist() for _ in range(len(expected) + 5)]
        assert read == expected + expected[:5]
        first[number] = read
    more_lanes_than_files = [
        made.lane(lane, 8, 1024, seed=0).readers[0].next().tolist() for lane in range(8)
    ]
    assert more_lanes_than_files == made.tokenize(texts[::6], 512)[0][:8]


def test_mixture_shares_and_length_filters(tokenizer, files):
    path = str(files / "shards")
    sources = [Source(path, weight=0.2), Source(path, weight=0.4, min_tokens=60),
               Source(path, weight=0.4, min_tokens=100)]  # fmt: skip
    lane = corpus(tokenizer, *sources).lane(0, 1, 2048, seed=0)
    assert [reader.documents.source.min_tokens for reader in lane.readers] == [0, 60, 100]
    drawn = [[], [], []]
    for number, reader in enumerate(lane.readers):
        reader.next = lambda next=reader.next, to=drawn[number]: to.append(next()) or to[-1]
    for _ in range(60):
        lane.next()
    counts = np.array(list(map(len, drawn)))
    shares = counts / counts.sum()
    assert np.abs(shares - [0.2, 0.4, 0.4]).max() < 5 * (0.24 / counts.sum()) ** 0.5
    shortest = [min(map(len, each)) for each in drawn]
    assert shortest[0] < 60 <= shortest[1] < 100 <= shortest[2]


@pytest.mark.parametrize("form", ["texts", "shards"])
def test_a_filter_counts_tokens_before_truncation(tokenizer, files, texts, form):
    path = files / ("all.txt" if form == "texts" else "shards")
    made = corpus(tokenizer, Source(str(path), min_tokens=128), max_length=128)
    long_enough = sum(len(ids) >= 128 for ids in tokenizer(texts)["input_ids"])
    documents = made.opened[0]
    found = [s for each in documents.sequences(range(len(documents))) for s in each]
    assert len(found) == long_enough and {len(s) for s in found} == {128}


def test_held_out_documents_are_never_trained_on(numbered_corpus):
    made, number = numbered_corpus(numbered(200), held_out=20)
    masking = Masking.of(made.tokenizer, 0.2, "mask")
    batches = made.validation(64, masking)
    originals = [b.packed.input_ids.index_copy(0, b.rows, b.labels) for b in batches]
    held_out = {
        number(s.numpy())
        for ids, b in zip(originals, batches, strict=True)
        for s in ids.split(b.packed.cu_seqlens.diff().tolist())
    }
    assert len(held_out) == 20
    reader = made.lane(0, 1, 64, seed=0).readers[0]
    assert {number(reader.next()) for _ in range(180)} == set(range(200)) - held_out
    again = made.validation(64, masking)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, again, strict=True))


def stream_of(made, ranks, size, steps, start=0, states=None):
    """What `ranks` processes see in `steps` steps: [step][rank] → micro-batches; and the states."""
    masking = Masking.of(made.tokenizer, 0.2, "mask")
    seen: list[list] = [[] for _ in range(steps)]
    merged = {}
    for rank in range(ranks):
        lanes = [
            made.lane(lane, LANES, 256, 0, states and states[lane])
            for lane in range(rank, LANES, ranks)
        ]
        with TrainingStream(lanes, masking, 7, size, start) as stream:
            items = list(itertools.islice(stream, steps))
        for step, (batches, _) in enumerate(items):
            seen[step].append(batches)
        merged |= items[-1][1]
    return seen, merged


@pytest.mark.parametrize("ranks, size", [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_is_the_same_for_any_number_of_processes(tokenizer, files, ranks, size):
    made = corpus(tokenizer, Source(str(files / "all.txt")))
    reference, _ = stream_of(made, 1, 1, steps=3)
    seen, _ = stream_of(made, ranks, size, steps=3)

    def sequences(step):
        found = []
        for batches in step:
            for b in batches:
                lengths = b.packed.cu_seqlens.diff().tolist()
                labels = torch.full_like(b.packed.input_ids, IGNORE_INDEX)
                labels[b.rows] = b.labels
                pairs = zip(b.packed.input_ids.split(lengths), labels.split(lengths), strict=True)
                found += [(ids.tolist(), labels.tolist()) for ids, labels in pairs]
        return sorted(found)

    assert [sequences(step) for step in seen] == [sequences(step) for step in reference]
    assert all(len(batches) == LANES // ranks // size for step in seen for batches in step)


def test_a_stream_resumes_with_the_same_masks(tokenizer, files):
    made = corpus(tokenizer, Source(str(files / "all.txt")))
    whole, _ = stream_of(made, 1, 2, steps=6)
    _, states = stream_of(made, 2, 1, steps=4)  # two processes stop, one goes on
    resumed, _ = stream_of(made, 1, 2, 2, 4, states)
    for before, after in zip(whole[4:], resumed, strict=True):
        for a, b in zip(before[0], after[0], strict=True):
            assert torch.equal(a.packed.input_ids, b.packed.input_ids)
            assert torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.packed.cu_seqlens, b.packed.cu_seqlens)


def test_errors_in_the_background_arrive(tokenizer, files):
    made = corpus(tokenizer, Source(str(files / "all.txt"), min_tokens=100_000), split=True)
    with pytest.raises(ValueError, match=r"all.txt has no document of at least min_tokens=100000"):
        stream_of(made, 1, 1, steps=1)
    with pytest.raises(ValueError, match="micro_batch_bins=3 must divide the 4 bins"):
        stream_of(made, 1, 3, steps=1)


def write(path, content):
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize("content, error", [
    ("", r"has no documents: 1 empty file\(s\)"),
    ('{"body": "a"}\n', r"has no field 'text'; it has 'body'"),
    ('{"text": "a"}\n{"text": \n', r"texts.jsonl cannot be read: "),
])  # fmt: skip
def test_bad_files(tmp_path, content, error):
    path = write(tmp_path / "texts.jsonl", content)
    with pytest.raises(ValueError, match=error):
        open_texts(Source(path))


def test_a_missing_field_of_a_stream(files):
    with pytest.raises(ValueError, match=r"has no field 'text'; it has .*'body'"):
        open_texts(Source(str(files / "part-*"), streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_is_none(tmp_path, tokenizer, streaming):
    path = write(tmp_path / "texts.jsonl", '{"text": "a word"}\n{"text": null}\n')
    made = corpus(tokenizer, Source(path, streaming=streaming))
    with pytest.raises(ValueError, match=r"field 'text' of document .* is not a string: None"):
        made.lane(0, 1, 128, seed=0).next()


def test_paths_that_are_nothing(tmp_path, files):
    for path in (str(tmp_path / "missing.jsonl"), "missing.jsonl", "", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is neither a file"):
            open_texts(Source(path))
    with pytest.raises(ValueError, match="must all be of one kind"):
        open_texts(Source(str(files / "*.*")))


def test_options_that_do_not_fit(tokenizer, files):
    path = str(files / "all.txt")
    with pytest.raises(ValueError, match=r"min_tokens of .* is 129, but documents are truncated"):
        corpus(tokenizer, Source(path, min_tokens=129))
    with pytest.raises(ValueError, match=r"weight of .* must be positive, got 0"):
        corpus(tokenizer, Source(path, weight=0))
    with pytest.raises(ValueError, match=r"has \d+ documents, of which 99999 cannot be held out"):
        corpus(tokenizer, Source(path), held_out=99999)
    with pytest.raises(ValueError, match="is streamed: no documents of it can be held out"):
        corpus(tokenizer, Source(path, streaming=True), held_out=1)
    with pytest.raises(ValueError, match="data names no source"):
        corpus(tokenizer)
    other = train_tokenizer(["some other words"])
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        corpus(other, Source(str(files / "shards")))
