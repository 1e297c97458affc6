"""Names of Ray, Optuna and MLflow that are not public: where they may be used, and that they are still there."""

import ast
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
USERS = {
    "ray": [
        f"ray_internals/{path.name}"
        for path in sorted((ROOT / "platform" / "ray_internals").glob("*.py"))
        if path.name != "__init__.py"
    ],
    "optuna": ["search/study_storage.py"],
    "mlflow": ["tracking/mlflow_internals.py"],
}
"""Modules of `platform/` that may use private names, by package."""

NOT_PUBLIC = (
    "mlflow.store",
    "ray.air",
    "ray.train.torch.config",
    "ray.train.v2",
    "ray.tune.execution",
    "ray.tune.impl",
)
"""Modules that have no underscore, but that nobody promises to keep."""

INSIDE = {"temporary_state", "run_metadata", "experiment_driver_staging_path"}
"""Attributes of Tune's trials that have no underscore, but lead into Tune."""


def contract(user: str) -> tuple[tuple[str, str, str], ...]:
    """What a module of `platform/` says that it uses; it is not imported, which would fail where a name is gone."""
    for node in ast.parse((ROOT / "platform" / user).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRIVATE":
            names: tuple[tuple[str, str, str], ...] = ast.literal_eval(node.value)
            return names
    raise AssertionError(f"platform/{user} must say in PRIVATE which names it uses")


NAMES = [(user, *entry) for users in USERS.values() for user in users for entry in contract(user)]


def has(owner: Any, names: list[str]) -> bool:
    """Whether a module or class has an attribute, which may be one that a class gives its objects."""
    name, *rest = names
    if hasattr(owner, name):
        return not rest or has(getattr(owner, name), rest)
    if not inspect.isclass(owner) or rest:
        return False
    if name in getattr(owner, "__slots__", ()) or name in getattr(owner, "__annotations__", {}):
        return True
    sources = [inspect.getsource(base) for base in owner.__mro__ if base.__module__ != "builtins"]
    return any(re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", source) for source in sources)


@pytest.mark.parametrize(
    ("user", "module", "name", "reason"), NAMES, ids=[f"{module}.{name}" for _, module, name, _ in NAMES]
)
def test_a_private_name_is_where_it_was(user: str, module: str, name: str, reason: str) -> None:
    package = module.partition(".")[0]
    version = importlib.metadata.version(package)
    gone = f"{package} {version} has no {module}.{name}, which platform/{user} needs to {reason}"
    try:
        owner: ModuleType = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{gone}: {error}")
    assert has(owner, name.split(".")), gone


def test_a_name_that_is_gone_is_missed() -> None:
    from ray.tune.execution import experiment_state

    assert has(experiment_state, ["_ExperimentCheckpointManager", "_checkpoint_period"])
    assert not has(experiment_state, ["_ExperimentCheckpointManager", "_checkpoint_pace"])
    assert not has(experiment_state, ["_CheckpointManager"])


def is_private(module: str, name: str = "") -> bool:
    """Whether a name of a module is one that its package may change without a word."""
    parts = [*module.split("."), name]
    return any(part.startswith("_") and not part.startswith("__") for part in parts) or any(
        f"{module}.{name}.".startswith(f"{hidden}.") for hidden in NOT_PUBLIC
    )


def private_imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of what a tree of code imports of the private parts of the three packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            entries = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            entries = [(alias.name, "") for alias in node.names]
        else:
            continue
        for module, name in entries:
            if module.partition(".")[0] in USERS and is_private(module, name):
                yield node.lineno, module, name


def private_attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of the attributes with an underscore that a module reads of objects that are not its own."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    defined |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and _is_self(node.value)}
    for node in attributes:
        hidden = node.attr.startswith("_") and not node.attr.startswith("__")
        if node.attr in INSIDE or (hidden and not _is_self(node.value) and node.attr not in defined):
            yield node.lineno, node.attr


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_are_used_in_their_places_alone() -> None:
    wrong = []
    for path in sorted((ROOT / "platform").rglob("*.py")):
        user = path.relative_to(ROOT / "platform").as_posix()
        tree = ast.parse(path.read_text())
        for line, module, name in private_imports(tree):
            if user not in USERS[module.partition(".")[0]]:
                wrong.append(f"platform/{user}:{line} imports {module}.{name}")
        if not any(user in users for users in USERS.values()):
            wrong += [f"platform/{user}:{line} reads {name}" for line, name in private_attributes(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("user", [user for users in USERS.values() for user in users])
def test_every_private_name_that_is_used_is_in_the_contract(user: str) -> None:
    tree = ast.parse((ROOT / "platform" / user).read_text())
    listed = {part for module, name, _ in contract(user) for part in f"{module}.{name}".split(".")}
    missing = [f"{line}: {module}.{name}" for line, module, name in private_imports(tree) if name not in listed]
    missing += [f"{line}: {name}" for line, name in private_attributes(tree) if name not in listed]
    assert not missing, "\n".join(missing)
