"""Prepared token shards: what is read is what was tokenized, killed writers and broken files."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset

from neobert.corpus import text_batches
from neobert.shards import CorruptShardError, TokenShards, prepare
from neobert.text import TextTokenizer
from tests.checkpoints import word_tokenizer

TEXTS = [f"the cat sat {'on the mat ' * (i % 7)}" if i % 5 else "" for i in range(400)]
TOKENIZER = word_tokenizer()
SOURCE = {"path": "test"}


def write(directory, batches=None, **options):
    data = Dataset.from_dict({"text": TEXTS})
    batches = batches or (lambda position: text_batches(data, "text", position))
    return prepare(
        directory, batches, TOKENIZER, **{"source": SOURCE, "shard_tokens": 500} | options
    )


def expected():
    ids, _ = TextTokenizer(TOKENIZER)([text for text in TEXTS if text], 1 << 30)
    return [each[1:-1] for each in ids]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "prepared"
    write(path)
    return path


def test_what_is_read_is_what_was_tokenized(directory):
    shards = TokenShards(directory)
    assert len(shards.shards) > 3 and shards.dtype == np.uint16
    assert [each.tolist() for each in shards] == expected()
    assert [shards.length(i) for i in range(len(shards))] == list(map(len, expected()))
    assert shards.num_tokens == sum(map(len, expected()))
    assert shards.tokenizer().get_vocab() == TOKENIZER.get_vocab()
    shards.check()
    with pytest.raises(IndexError):
        shards[len(shards)]


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_killed_writer_goes_on(tmp_path, directory, survivors):
    data = Dataset.from_dict({"text": TEXTS})

    def dies(position):
        for texts, after in text_batches(data, "text", position):
            yield texts, after
            if after >= 128 * survivors + 64:
                raise KeyboardInterrupt

    path = tmp_path / "prepared"
    with pytest.raises(KeyboardInterrupt):
        write(path, dies)
    done = len(json.loads((path / "shards.json").read_text())["shards"])
    with pytest.raises(ValueError, match=r"not finished .* run the same `neobert prepare` again"):
        TokenShards(path)
    (path / f"{done:05}.tokens").write_bytes(b"half a shard")  # what a killed write may leave
    read = []

    def counted(position):
        read.append(position)
        yield from text_batches(data, "text", position)

    write(path, counted)
    assert (read[0] or 0) >= 64 * done, "it began anew"
    for name in ("00000.tokens", "00001.offsets", "shards.json"):
        assert (path / name).read_bytes() == (directory / name).read_bytes()
    assert [each.tolist() for each in TokenShards(path)] == expected()


def test_a_finished_directory_is_not_written_again(tmp_path):
    path = tmp_path / "prepared"
    write(path)

    def never(position):
        raise AssertionError("read again")

    assert len(write(path, never)) == len(expected())


def test_an_unfinished_directory_of_something_else_is_refused(directory):
    with pytest.raises(ValueError, match=r"begun with another source: .*'test'.*'other'"):
        write(directory, source={"path": "other"})
    with pytest.raises(ValueError, match="begun with another shard_tokens"):
        write(directory, shard_tokens=7)


def test_no_token_at_all(tmp_path):
    data = Dataset.from_dict({"text": ["", " "]})
    with pytest.raises(ValueError, match=r"there is no token in the texts of {'path': 'test'}"):
        write(tmp_path / "prepared", lambda position: text_batches(data, "text", position))


@pytest.fixture
def broken(tmp_path, directory):
    return shutil.copytree(directory, tmp_path / "broken")


def test_a_short_file(broken):
    path = broken / "00002.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptShardError, match=r"00002.tokens has [\d,]+ bytes; shards.json says"):
        TokenShards(broken)


def test_a_missing_file(broken):
    (broken / "00001.offsets").unlink()
    with pytest.raises(CorruptShardError, match=r"00001.offsets is missing"):
        TokenShards(broken)


def test_a_flipped_byte(broken):
    path = broken / "00001.tokens"
    content = bytearray(path.read_bytes())
    content[101] ^= 0x80  # the high byte of an id
    path.write_bytes(content)
    shards = TokenShards(broken)
    with pytest.raises(CorruptShardError, match=r"00001.tokens: its checksum is wrong"):
        shards.check()
    with pytest.raises(CorruptShardError, match=r"has the id .*, beyond the vocabulary of"):
        list(shards)


def test_nonsense_offsets(broken):
    path = broken / "00001.offsets"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CorruptShardError, match=r"00001.offsets: document \d+ is tokens -1 to -1"):
        list(TokenShards(broken))


def test_a_broken_index(broken):
    (broken / "shards.json").write_text("{")
    with pytest.raises(CorruptShardError, match=r"shards.json is not JSON"):
        TokenShards(broken)
    (broken / "shards.json").write_text('{"format": 7}')
    with pytest.raises(CorruptShardError, match=r"not of format 1"):
        TokenShards(broken)


def test_nothing_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no shards.json: `neobert prepare` writes"):
        TokenShards(tmp_path)
