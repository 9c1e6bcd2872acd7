"""What a figure depends on beside the code: the machine, its software, and the commit."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

from neobert_kernels import _compiled

ROOT = Path(__file__).parent.parent


def machine(device: str | None = None) -> dict:
    """A description of the machine, or with device "cpu" without the GPU that it may have.

    Naming a GPU starts its driver in this process.
    """
    description = {
        "cpu": _cpu_model(),
        "cores": torch.get_num_threads(),
        "cpu_kernels": _compiled.LOADED,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device != "cpu" and torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        description["driver, clock"] = subprocess.run(query, capture_output=True, text=True).stdout
        description["triton"] = importlib.metadata.version("triton")
    return description


def machine_name(here: dict) -> str:
    """The name of a machine's results file: its GPU's name or else its CPU's."""
    name = here.get("gpu") or f"{here['cpu']} {here['cores']} cores {here['cpu_kernels'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The checked-out commit, with a mark if the code in the tree differs from it; outside a
    checkout the installed version."""
    if not (ROOT / ".git").exists():
        return f"version {importlib.metadata.version('neobert-kernels')}"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _cpu_model() -> str:
    """The CPU's name and, since clouds call several generations of AMD's by one, its family."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name, family = (
        re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        for key in ("model name", "cpu family")
    )
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name[1]} family {family[1]}" if family else name[1]
