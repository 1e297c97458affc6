"""CONTRIBUTING.md: a method, a dataset reader and a label-free score are added by its steps alone, and work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_WORDS

ROOT = Path(__file__).parents[1]
SOURCES = ("platform", "search_spaces", "trainables")
BLOCK = re.compile(r"^```python (file|edit)=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(folder: Path) -> None:
    """Copy the sources into a folder, as the package that they make, and follow the steps."""
    package = folder / "segadapt"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "platform" / "front", package, ignore=ignored)
    for name in SOURCES:
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(blocks) == 9
    for kind, name, content in blocks:
        path = package / name
        if kind == "file":
            assert not path.exists()
            path.write_text(content)
            continue
        before, _, after = (part.strip("\n") for part in content.partition(">>>\n"))
        text = path.read_text()
        assert text.count(before) == 1, f"{name} must hold once:\n{before}"
        path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def contributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contributed")
    follow(folder)
    return folder


def run(folder: Path, *words: str) -> str:
    """Run the command line on the copied sources; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "segadapt.platform.cli", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_method_is_listed_described_and_searched(contributed: Path) -> None:
    assert "entropy_minimization" in run(contributed, "list")
    assert "0.0001 to 1 (log)" in run(contributed, "describe", "entropy_minimization")
    searched = run(contributed, "search", "entropy_minimization", "--trials", "1", "--name", "toy", *TINY_WORDS)
    assert "entropy_minimization-001" in searched
    chosen = run(contributed, "runs", "toy", "--selection")
    assert "score/margin" in chosen, "the score that was added is judged with the others"


@pytest.mark.slow
def test_a_search_may_go_by_the_new_score(contributed: Path) -> None:
    words = ("--objective", "score/margin", "--trials", "1", "--name", "by-margin")
    assert "score/margin" in run(contributed, "search", "source_only", *words, *TINY_WORDS)


@pytest.mark.slow
def test_a_dataset_of_the_new_kind_is_written_checked_and_trained_on(contributed: Path) -> None:
    small = [word for word in TINY_WORDS if word.startswith("data.streets")]
    run(contributed, "data", "make", "cars", *small, "--format", "beside")
    run(contributed, "data", "make", "game", *small, "--format", "gta5")
    assert "is sound" in run(contributed, "data", "check", "beside", "cars")
    words = [word for word in TINY_WORDS if not word.startswith("data.streets")]
    places = ("data.source=gta5:game", "data.target=beside:cars", "augmentation.source_size=[32,64]")
    assert "source_only" in run(contributed, "train", "source_only", "--name", "own", *places, *words)
