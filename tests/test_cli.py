"""The `neobert` command, run as users run it: in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from neobert.cli import app
from neobert.encode import Encoder
from neobert.files import InputError, NpyWriter, count_lines, read_texts, replace_file
from neobert.sentence_folder import write_sentence_folder
from tests.tiny import HIDDEN_SIZE, MAX_LENGTH, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ["first text", "", "a third, somewhat longer text", "na\u00efve \u4e2d\u6587", "last"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder.from_pretrained(checkpoint, device="cpu")


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "neobert", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def run(*arguments, stdin=None):
    """In this process; returns the exit code and what it said."""
    result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_of_lines(tmp_path, checkpoint, encoder):
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_bytes("\r\n".join(LINES).encode("utf-8-sig"))
    process = start("encode", "--model", checkpoint, "--input", source, "--output", output,
                    "--device", "cpu", "--progress")  # fmt: skip
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    rows = np.load(output)
    assert rows.shape == (len(LINES), HIDDEN_SIZE) and rows.dtype == np.float32
    close(rows, encoder.encode(LINES))
    assert f"{len(LINES)}/{len(LINES)}" in said and "tok/s" in said
    assert f"{len(LINES)} x {HIDDEN_SIZE} float32" in said
    assert set(os.listdir(tmp_path)) == {"out.npy", "texts.txt"}
    assert np.load(output, mmap_mode="r").flags["C_CONTIGUOUS"]


def test_jsonl_from_standard_input_with_every_option(tmp_path, checkpoint):
    output = tmp_path / "out.npy"
    lines = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in LINES)
    code, said = run("encode", "--model", checkpoint, "--input", "-", "--output", output,
                     "--field", "body", "--pooling", "cls", "--normalize", "--prompt", "query: ",
                     "--max-length", 8, "--max-tokens", 16, "--dtype", "bfloat16",
                     "--device", "cpu", stdin=lines.encode())  # fmt: skip
    assert code == 0, said
    encoder = Encoder.from_pretrained(checkpoint, "cpu", "bfloat16", max_length=8)
    with pytest.warns(match="texts were longer"):
        expected = encoder.encode(LINES, "cls", True, "query: ", max_tokens=16)
    close(np.load(output), expected)
    assert f"{encoder.stats.truncated} of {len(LINES)} texts were longer than 8 tokens" in said
    assert "UserWarning" not in said and "bfloat16" in said


def test_a_models_own_pooling_length_and_prompts(tmp_path):
    """`encode` and `index` embed alike what a sentence-transformers folder says how to."""
    model, source, output = tmp_path / "model", tmp_path / "texts.txt", tmp_path / "out.npy"
    write_tiny_checkpoint(model)
    write_sentence_folder(model, HIDDEN_SIZE, 8, {"query": "find: ", "document": "text: "})
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    source.write_text("\n".join(LINES).replace("\n\n", "\n"))
    command = ["--model", model, "--input", source, "--device", "cpu", "--output"]
    code, said = run("index", *command, tmp_path / "index")
    assert code == 0, said
    code, said = run("encode", *command, output, "--prompt-name", "document", "--normalize")
    assert code == 0 and "longer than 8 tokens" in said and "--prompt-name" not in said, said
    close(np.load(output), np.load(tmp_path / "index" / "embeddings.npy"))
    code, said = run("encode", *command, output)
    assert code == 0 and "no prompt goes before the texts" in said and "query, document" in said
    expected = Encoder.from_pretrained(model, "cpu").encode(LINES[:1], "cls", prompt="")
    close(np.load(output)[:1], expected)
    for options, error in (
        (["--prompt-name", "quary"], "no prompt named 'quary'; it has query, document"),
        (["--prompt-name", "query", "--prompt", "x"], "one of the two"),
    ):
        code, said = run("encode", *command, output, *options)
        assert code == 1 and error in said, said


@pytest.mark.parametrize(("content", "rows"), [(b"", 0), (b"\n", 1), (b"a\n\nb", 3)])
def test_rows_are_lines(tmp_path, checkpoint, content, rows):
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_bytes(content)
    assert count_lines(source) == rows
    code, said = run("encode", "--model", checkpoint, "--input", source, "--output", output)
    assert code == 0, said
    assert np.load(output).shape == (rows, HIDDEN_SIZE)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing_and_the_old_file_as_it_was(tmp_path, checkpoint, name):
    output = tmp_path / "out.npy"
    output.write_bytes(b"the old file")
    process = start("encode", "--model", checkpoint, "--input", "-", "--output", output,
                    "--device", "cpu", "--max-tokens", 16, "--progress",
                    stdin=subprocess.PIPE)  # fmt: skip

    def feed():
        try:
            while True:
                process.stdin.write(b"one more line of text\n" * 100)
        except BrokenPipeError:
            pass

    feeder = threading.Thread(target=feed)
    feeder.start()
    said = b""
    while b"tok/s" not in said:  # it computes
        said += os.read(process.stderr.fileno(), 4096)
        assert process.poll() is None, said.decode()
    (unfinished,) = set(os.listdir(tmp_path)) - {"out.npy"}
    deadline = time.monotonic() + 30
    while (tmp_path / unfinished).stat().st_size < 1000:  # and has written rows
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    said = process.stderr.read().decode()
    code = process.wait(30)
    feeder.join(30)
    assert code == 128 + getattr(signal, name), said
    assert f"{name}: stopped" in said and "Traceback" not in said
    assert os.listdir(tmp_path) == ["out.npy"]
    assert output.read_bytes() == b"the old file"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad json", r"not JSON \("),
        ("", r"not JSON \("),
        ('["a list"]', "not a JSON object"),
        ('{"title": "a", "id": 7}', "no field 'text'; it has 'title', 'id'"),
        ('{"text": null}', "field 'text' is not a string: None"),
        ('{"text": "\\ud800"}', "field 'text' is not valid Unicode"),
    ],
)
def test_a_bad_json_line_is_named_and_nothing_is_written(tmp_path, checkpoint, line, message):
    source, output = tmp_path / "texts.jsonl", tmp_path / "out.npy"
    source.write_text('{"text": "good"}\n' * 99 + line + "\n")
    with open(source, "rb") as lines, pytest.raises(InputError, match=f"x, line 100: {message}"):
        list(read_texts(lines, "x", "text"))
    code, said = run("encode", "--model", checkpoint, "--input", source, "--output", output,
                     "--field", "text", "--max-tokens", 16)  # fmt: skip
    assert code == 1 and f"Error: {source}, line 100:" in said
    assert os.listdir(tmp_path) == ["texts.jsonl"]


def test_a_line_that_is_not_utf8_is_named(tmp_path, checkpoint):
    source = tmp_path / "texts.txt"
    source.write_bytes(b"good\n\xff\n")
    code, said = run("encode", "--model", checkpoint, "--input", source, "--output", tmp_path / "o")
    assert code == 1 and "line 2: not UTF-8" in said
    assert os.listdir(tmp_path) == ["texts.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "absent.txt"}, "No such file or directory: 'absent.txt'"),
        ({"--output": "absent/out.npy"}, "No such file or directory"),
        ({"--model": "absent"}, "'absent' is neither a directory nor a hub repository"),
        ({"--max-length": MAX_LENGTH + 1}, f"max_length must be between 3 .* {MAX_LENGTH + 1}"),
        ({"--max-tokens": 0}, "max_tokens must be at least 1"),
        ({"--device": "abacus"}, "device must be one of cpu, cuda, got abacus"),
    ],
)
def test_mistaken_options(tmp_path, checkpoint, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a\n")
    options = {"--model": checkpoint, "--input": "texts.txt", "--output": "out.npy", **change}
    code, said = run("encode", *(word for option in options.items() for word in option))
    assert code == 1
    assert re.search(f"Error: .*{message}", said), said
    assert os.listdir(tmp_path) == ["texts.txt"]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("encode", "--dtype", "float8"),
        ("bench", "--dtype", "float8"),
        ("eval mteb", "--dtype", "float8"),
        ("eval perplexity", "--dtype", "float8"),
        ("encode", "--pooling", "max"),
        ("index", "--pooling", "max"),
    ],
)
def test_a_name_that_an_option_does_not_have(command, option, value):
    code, said = run(*command.split(), option, value)
    assert code == 2 and f"'{value}' is not one of" in said and option in said, said


def test_signal_handlers_are_restored(tmp_path, checkpoint):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    (tmp_path / "texts.txt").write_text("a\n")
    run("encode", "--model", checkpoint, "--input", tmp_path / "texts.txt",
        "--output", tmp_path / "out.npy")  # fmt: skip
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_file(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    replace_file(path, "new \u00e9")
    assert path.read_text("utf-8") == "new \u00e9" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("sizes", [[], [3], [1, 0, 2], [5000, 6000]])
def test_npy_writer_writes_what_numpy_reads(tmp_path, sizes):
    parts = [np.random.default_rng(0).random((n, 7), np.float32) for n in sizes]
    with NpyWriter(tmp_path / "a.npy") as writer:
        writer.dim = 7
        for part in parts:
            writer.write(part)
        assert not (tmp_path / "a.npy").exists()
    expected = np.concatenate([np.empty((0, 7), np.float32), *parts])
    actual = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.float32


def test_npy_writer_refuses_other_rows(tmp_path):
    with pytest.raises(ValueError, match=r"rows must be \(n, 7\) float32, got \(2, 8\)"):
        with NpyWriter(tmp_path / "a.npy") as writer:
            writer.write(np.zeros((2, 7), np.float32))
            writer.write(np.zeros((2, 8), np.float32))
    assert os.listdir(tmp_path) == []


def test_info_names_versions_devices_and_kernels():
    code, said = run("info")
    assert code == 0
    for word in ("python", "torch", "transformers", "triton", "cpu", "threads", "varlen_attention"):
        assert word in said


def test_help_lists_the_commands():
    code, said = run("--help")
    assert code == 0 and "encode" in said and "info" in said
    code, said = run("encode", "--help")
    assert code == 0 and "--max-tokens" in said
