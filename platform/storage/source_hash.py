"""Hashes of source code: what computed a result, so that a change of it is noticed."""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = "segadapt.trainables"


@functools.cache
def source_hash(modules: tuple[str, ...]) -> str:
    """Return a hash over the files of these modules and of all they import from `trainables`, directly or not.

    It is equal wherever the same version is installed, and changes with any edit of these files, also of a comment.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_closure(modules).items()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _closure(modules: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of modules and of what they import, by module name."""
    paths: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in paths or (path := _file(name)) is None:
            continue
        paths[name] = path
        waiting += _imported(path)
    return paths


@functools.cache
def _imported(path: Path) -> tuple[str, ...]:
    """Return what a file may import from `trainables`; some are names in a module rather than modules."""
    return tuple(_names(ast.parse(path.read_text(encoding="utf-8"))))


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(_PACKAGE))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_PACKAGE):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def _file(module: str) -> Path | None:
    """Return the file of a module; None if there is no module of this name."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent is a module, not a package
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
