"""Where a run's checkpoints and metrics go besides its directory: the hub and Weights & Biases."""

import dataclasses
import shutil
import sys
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from neobert import hub
from neobert.metrics import WANDB_RUN, read_metrics
from neobert.model import NeoBERTLMHead
from neobert.pretrain import pretrain
from tests.runs import settings, write_texts

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 60)


class Hub:
    """What HfApi does, into a folder. An upload is done when somebody waits for it."""

    def __init__(self, folder):
        self.folder, self.created, self.commits, self.fails = folder, [], [], set()
        self.api = create_autospec(HfApi, instance=True)
        self.api.create_repo.side_effect = self.create_repo
        self.api.upload_folder.side_effect = self.upload_folder

    def create_repo(self, repo_id, *, private, exist_ok):
        self.created.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self, *, repo_id, folder_path, ignore_patterns, commit_message, run_as_future
    ):
        assert run_as_future
        future = Future()
        hub = self

        def upload(timeout=None):
            if commit_message in hub.fails:
                return ConnectionError("no route to the hub")
            shutil.rmtree(hub.folder, ignore_errors=True)
            hub.folder.mkdir()
            names = [path.name for path in folder_path.iterdir()]
            for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
                shutil.copy(folder_path / name, hub.folder)
            hub.commits.append(commit_message)
            return None

        future.exception = upload
        return future


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda: fake.api)
    return fake


def test_every_checkpoint_is_pushed_before_the_next_may_remove_it(texts, tmp_path, fake_hub):
    config = settings(
        texts, tmp_path / "run", push_to_hub="someone/model", keep_checkpoints=1, steps=8
    )
    pretrain(config)
    assert fake_hub.created == [("someone/model", True, True)]
    assert fake_hub.commits == ["Step 3", "Step 6", "Step 8"]
    names = {path.name for path in fake_hub.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"optimizer.pt", "progress.json"} & names
    NeoBERTLMHead.from_pretrained(fake_hub.folder)


def test_a_failed_push_is_said_and_the_run_goes_on(texts, tmp_path, fake_hub, capsys):
    fake_hub.fails = {"Step 3", "Step 8"}
    result = pretrain(settings(texts, tmp_path / "run", push_to_hub="someone/model"))
    assert result.step == 8
    assert fake_hub.commits == ["Step 6"]
    said = capsys.readouterr().out
    assert said.count("is not on the hub: ConnectionError: no route to the hub") == 2
    assert f"hf upload someone/model {result.checkpoint}" in said


def test_a_repository_that_cannot_be_made_ends_the_run_before_it_begins(texts, tmp_path, fake_hub):
    fake_hub.api.create_repo.side_effect = ConnectionError("401")
    with pytest.raises(ConnectionError):
        pretrain(settings(texts, tmp_path / "run", push_to_hub="someone/model"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what is logged, by the id of the run."""
    module = ModuleType("wandb")
    module.runs, module.finished = {}, []

    def init(*, project, name, id, resume, dir):
        assert resume == "allow"
        records = module.runs.setdefault(id, [])
        return SimpleNamespace(
            log=records.append,
            define_metric=lambda name, step_metric: None,
            finish=lambda: module.finished.append(id),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_has_the_records_of_the_run_and_goes_on_with_it(texts, tmp_path, wandb):
    config = settings(texts, tmp_path / "run", wandb="neobert", steps=3)
    pretrain(config)
    (run,) = wandb.runs
    assert (tmp_path / "run" / WANDB_RUN).read_text() == run
    assert wandb.runs[run] == read_metrics(tmp_path / "run")
    pretrain(dataclasses.replace(config, steps=6))
    assert wandb.runs[run] == read_metrics(tmp_path / "run")
    assert wandb.finished == [run, run]
    pretrain(dataclasses.replace(config, output=str(tmp_path / "another")))
    assert len(wandb.runs) == 2


def test_wandb_that_is_not_installed(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb='neobert' needs a package: pip install wandb"):
        pretrain(settings(texts, tmp_path / "run", wandb="neobert"))
