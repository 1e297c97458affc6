"""What a run depended on: versions, machine and git state."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("segadapt", "ray", "torch", "torchvision", "optuna", "mlflow", "numpy", "pyarrow")


def environment() -> dict[str, Any]:
    """Return versions, processor and the git state of the folder the command runs in."""
    return {**machine(), "git": git_state(Path.cwd())}


def machine() -> dict[str, Any]:
    """Return versions and processor."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it, or None outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def git_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the commit as MLflow's own tag, under which its pages show it."""
    git = environment["git"]
    return {"mlflow.source.git.commit": git["commit"]} if git else {}
