"""Checkpoints on the Hugging Face hub, while the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from neobert.saving import DEEPSPEED, OPTIMIZER, PROGRESS


class HubPush:
    """Uploads checkpoints in the background, each as one commit, without what only training needs.

    repository: "owner/name". It is created, private, if it does not exist; that is done here, so
        that a run without a token or with a name that the hub refuses ends before its first step.
    say: is told about an upload that failed. The run goes on, the next checkpoint is tried anew.
    """

    def __init__(self, repository: str, say: Callable[[str], object]):
        self.api = HfApi()
        self.repository = self.api.create_repo(repository, private=True, exist_ok=True).repo_id
        self.say = say
        self.upload: Future[Any] | None = None
        self.uploading: Path | None = None

    def push(self, checkpoint: Path, step: int) -> None:
        """Begin the upload of a checkpoint. It must stay where it is until `wait` returns."""
        self.wait()
        self.uploading = checkpoint
        self.upload = self.api.upload_folder(
            repo_id=self.repository,
            folder_path=checkpoint,
            ignore_patterns=[OPTIMIZER, PROGRESS, f"{DEEPSPEED}/*", "zero_to_fp32.py", "latest"],
            commit_message=f"Step {step}",
            run_as_future=True,
        )

    def wait(self) -> None:
        """Return when nothing is being uploaded any more."""
        if self.upload is None:
            return
        error = self.upload.exception()
        self.upload = None
        if error is not None:
            self.say(
                f"{self.uploading} is not on the hub: {type(error).__name__}: {error}. To try "
                f"again: hf upload {self.repository} {self.uploading}"
            )
