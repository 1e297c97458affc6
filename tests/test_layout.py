"""The folders are the architecture: what is importable, from where, and in which direction."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
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


RULE = (
    ("errors",),
    ("ray_internals",),
    ("settings",),
    ("storage",),
    ("cluster", "trial", "search", "tracking"),
    ("results",),
    ("experiment",),
    ("deployment", "doctor"),
    ("api",),
    ("front", "cli"),
)
"""The rooms of `platform/`: each imports only what stands left of it, and those in one pair of brackets do not know
each other."""

RANKS = {room: rank for rank, rooms in enumerate(RULE) for room in rooms}


def modules() -> dict[str, Path]:
    """All modules of `platform/` by name."""
    found = {}
    for path in (ROOT / "platform").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(["segadapt", *(part for part in parts if part != "__init__")])] = path
    return found


def imports(tree: ast.AST, known: Collection[str]) -> Iterator[tuple[str, int]]:
    """The modules of `platform/` that a tree of code imports, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segadapt.platform"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module), node.lineno


def test_every_room_has_its_place_in_the_rule() -> None:
    assert {path.name.removesuffix(".py") for path in (ROOT / "platform").iterdir() if path.name != "py.typed"} <= {
        *RANKS,
        "__pycache__",
    }


def test_rooms_import_only_to_the_left() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        room = name.split(".")[2]
        for module, line in imports(ast.parse(path.read_text()), known):
            other = module.split(".")[2]
            if other != room and RANKS[other] >= RANKS[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {other} ({module})")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {
        name: {module for module, _ in imports(_without_types(ast.parse(path.read_text())), known)} - {name}
        for name, path in known.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def _without_types(tree: ast.Module) -> ast.Module:
    """All statements but those for type checkers alone: an import in a function makes a circle as well."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])


LARGEST = {"lines of a file": 450, "files of a folder": 20, "lines of a function": 60, "parameters of a function": 10}


@pytest.mark.parametrize("folder", ["platform", "trainables"])
def test_files_folders_and_functions_are_no_larger_than_they_may(folder: str) -> None:
    """A command of the command line may have more parameters: each is an option."""
    sizes: list[tuple[str, str, int]] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        sizes.append(("lines of a file", name, len(text.splitlines())))
        sizes.append(("files of a folder", path.parent.name, len(list(path.parent.glob("*.py")))))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{name}:{node.lineno} {node.name}"
                sizes.append(("lines of a function", where, (node.end_lineno or 0) - node.lineno + 1))
                if not name.startswith("platform/cli/"):
                    sizes.append(("parameters of a function", where, _parameters(node)))
    wrong = [f"{where}: {size} {what}" for what, where, size in sizes if size > LARGEST[what]]
    assert not wrong, "\n".join(sorted(set(wrong)))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return (
        len([entry for entry in named if entry.arg not in ("self", "cls")])
        + bool(arguments.vararg)
        + bool(arguments.kwarg)
    )


def test_the_picture_of_the_rooms_is_drawn_from_the_code() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "draw_architecture.py", "--check"], check=False)
    assert done.returncode == 0, "run `python docs/draw_architecture.py`, and look at docs/images/architecture.svg"


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
    names = {folder: "segadapt." + ".".join(folder.parts) for folder in folders} | {Path("platform/front"): "segadapt"}
    assert sorted(packages) == sorted(names.values())


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
            if parts == ("platform", "front", "__init__"):
                continue  # it is `segadapt` itself
            if parts[-1] == "__main__":
                continue
            if parts[-1] == "kernels" and importlib.util.find_spec("triton") is None:
                continue
            importlib.import_module(".".join(["segadapt", *(part for part in parts if part != "__init__")]))
