"""docs/networks.md: a backbone of one's own is a network like any other once its package is installed."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import TINY_WORDS

BLOCK = re.compile(r"^```(?:python|toml) file=(\+?)(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
USE = """
import torch
from segadapt.trainables.core.networks import build_segmenter, recompute_blocks
from segadapt.trainables.core.networks.timm_models import TimmBackbone

for name, head, grid in (("vit_tiny_patch8", "light", (32, 48)), ("convolutions", "pyramid", (16, 24))):
    segmenter = build_segmenter(f"timm:{name}", 3)
    segmenter(torch.randn(2, 3, 64, 96)).logits.sum().backward()
    assert [key for key, parameter in segmenter.named_parameters() if parameter.grad is None] == []
    assert segmenter(torch.randn(1, 3, 64, 96)).logits.shape == (1, 3, *grid)
    backbone = segmenter.backbone
    assert isinstance(backbone, TimmBackbone)
    assert sorted(set(backbone.depths().values()))[:3] == [0, 1, 2]
    assert list(backbone.stem.parameters())
try:
    recompute_blocks(segmenter)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the docs, built by setuptools and unpacked as an installation does."""
    sources, wheels, installed = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "installed"))
    blocks = BLOCK.findall((Path(__file__).parents[2] / "docs" / "networks.md").read_text())
    assert [name for _, name, _ in blocks] == ["my_backbones.py", "pyproject.toml", "my_backbones.py"]
    for more, name, content in blocks:
        with (sources / name).open("a" if more else "w") as file:
            file.write(content)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=sources, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return installed


def run(installed: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def test_the_backbones_of_the_docs_are_built_and_learn(installed: Path) -> None:
    done = run(installed, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert "recompute=true needs a backbone with set_grad_checkpointing, but Convolutions has none" in done.stdout


@pytest.mark.slow
def test_trials_find_the_backbone(installed: Path, tmp_path: Path) -> None:
    words = ["train", "source_only", "--storage", str(tmp_path / "runs"), "network.name=timm:vit_tiny_patch8"]
    done = run(installed, "-m", "segadapt.platform.cli", *words, *TINY_WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "runs").rglob("checkpoint_*/manifest.json"))


def test_a_package_that_does_not_import_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[segadapt.backbones]\nmine = absent_module\n")
    build = "from segadapt.trainables.core.networks import build_segmenter; build_segmenter('timm:unknown', 3)"
    done = run(tmp_path, "-c", build)
    assert "'absent_module' of the package broken raises ModuleNotFoundError: No module named" in done.stderr
