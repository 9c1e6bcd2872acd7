"""What tells models and data apart that are at the same path, one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedModel

from neobert.files import replace_file

# The files that decide what a directory's model computes.
MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "vocab.txt",
    "special_tokens_map.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def model_revision(model: PreTrainedModel) -> str | None:
    """Of a loaded model: a digest of the directory's files, or the hub's commit."""
    name = model.name_or_path  # what it was loaded from
    if name and Path(name).is_dir():
        return directory_digest(Path(name))
    return getattr(model.config, "_commit_hash", None)


def checkpoint_digest(path_or_hub_id: str | Path) -> str | None:
    """`directory_digest` of a directory, None of a hub repository."""
    path = Path(path_or_hub_id)
    return directory_digest(path) if path.is_dir() else None


def directory_digest(directory: Path) -> str:
    """40 digits that tell a directory's model from any other."""
    files = {file for pattern in MODEL_FILES for file in directory.glob(pattern)}
    return files_digest((file.relative_to(directory).as_posix(), file) for file in sorted(files))


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """40 digits of names and contents, in this order. A file is read once in a process, unless its
    size or its time of change says that it is another."""
    stats = ((name, file, file.stat()) for name, file in files)
    return _digest(
        tuple((name, file, s.st_size, s.st_mtime_ns, s.st_ino) for name, file, s in stats)
    )


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, file, *_ in files:
        digest.update(name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:40]


def note_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Writes the digests of what a run is computed from to `path`, once.

    inputs: digest by what it is of; None for what is not at hand, a hub repository for one.
    """
    if not path.exists():
        replace_file(path, json.dumps(inputs, indent=1) + "\n")


def check_same_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Raises ValueError if `note_inputs` wrote other digests to `path`. Of what is not at hand, now
    or then, and of runs of older versions, which noted none, nothing is said."""
    begun = json.loads(path.read_text()) if path.exists() else {}
    changed = [
        name
        for name, digest in inputs.items()
        if None not in (digest, begun.get(name)) and digest != begun[name]
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run of another {' and '.join(changed)}: the files have changed "
            "since it began. Choose another output"
        )
