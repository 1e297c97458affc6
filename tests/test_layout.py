"""The folders are the architecture: what is importable, from where, and in which direction."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "search_spaces", "trainables")
FORBIDDEN = {
    "trainables": {
        "ray",
        "mlflow",
        "optuna",
        "pyarrow",
        "yaml",
        "pydantic",
        "triton",
        "segadapt.platform",
        "segadapt.search_spaces",
    },
    "search_spaces": {"ray", "mlflow", "torch", "segadapt.platform"},
}
ALLOWED = {
    "trainables/core/data/packing.py": {"pyarrow"},
    "trainables/core/data/readers/folder.py": {"yaml"},
    "trainables/core/data/readers/shard_format.py": {"pyarrow"},
    "trainables/core/data/readers/shards.py": {"pyarrow"},
    "trainables/core/labelling/files.py": {"pyarrow"},
    "trainables/core/losses/kernels.py": {"triton"},
    "trainables/core/losses/pixel_similarity.py": {"triton"},
}
"""Own data lists its classes in YAML, packed data and pseudo labels are Parquet; imported when they are opened.

Triton comes with torch for CUDA alone; imported when its kernels are asked for.
"""


def test_the_standard_library_platform_is_found_from_the_root() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip()
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform" / "__init__.py").exists()


def test_every_source_folder_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert sorted(packages) == sorted("segadapt." + ".".join(folder.parts) for folder in folders)


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                for forbidden in FORBIDDEN[folder] - ALLOWED.get(path.relative_to(ROOT).as_posix(), set()):
                    assert not f"{name}.".startswith(f"{forbidden}."), f"{path} imports {name}"


def test_every_module_imports() -> None:
    import importlib.util

    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "kernels" and importlib.util.find_spec("triton") is None:
                continue
            importlib.import_module(".".join(["segadapt", *(part for part in parts if part != "__init__")]))
