"""Before trials start on a cluster: have all its nodes the same code, and do they see the data and the storage?"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import TrialConfig
from segadapt.trainables.core.data.datasets import split_location
from segadapt.trainables.core.data.readers.shard_format import is_uri

_TIMEOUT_S = 90.0
"""For a node to answer: its first worker process imports Ray meanwhile."""

_MARK = "driver"
"""File that the driver writes into the storage folder, and its content."""


@dataclass(frozen=True)
class NodeReport:
    """What one node has."""

    versions: Mapping[str, str]
    """Of Python and packages; of segadapt with a hash over its files."""
    missing: Sequence[str]
    """Paths that are not there."""
    sees_mark: bool
    """Whether the storage shows what the driver wrote."""
    refused: str | None
    """Why the storage cannot be written, if so."""


def data_paths(configs: Iterable[TrialConfig]) -> list[str]:
    """Return the folders and files that trials read, besides the storage."""
    paths: dict[str, None] = {}
    for config in configs:
        for location in (config.data.source, config.data.target):
            if location is not None and not is_uri(root := split_location(location, "")[1]):
                paths[root] = None
        weights = config.network.weights
        if weights is not None and ("/" in weights or Path(weights).suffix):
            paths[weights] = None
    return list(paths)


def check_nodes(storage: Path, paths: Sequence[str], timeout_s: float = _TIMEOUT_S) -> None:
    """Make sure that trials can run on every node of the cluster this process is connected to.

    Nodes that join later are not looked at.

    Args:
        storage: The storage folder.
        paths: What trials read besides.
        timeout_s: For all nodes to answer.

    Raises:
        UsageError: If a node differs or cannot; names it and says in what.
    """
    problems = node_problems(storage, paths, timeout_s)
    if problems:
        listed = "\n  ".join(problems)
        raise UsageError(
            "All nodes of the cluster must have the same segadapt, Ray, torch and Python as this process, and see data "
            f"and storage, but:\n  {listed}\n"
            "Install the same wheel everywhere and mount the same folders, or take the node out of the cluster."
        )


def node_problems(storage: Path, paths: Sequence[str] = (), timeout_s: float = _TIMEOUT_S) -> list[str]:
    """Return in what nodes differ from this process or cannot run trials, sorted by their names; see `check_nodes`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = _make_report()
    # A node that is late may write into the folder while it is removed.
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=storage, ignore_cleanup_errors=True) as folder:
        probe = Path(folder)
        probe.chmod(0o777)  # nodes may run as other users
        (probe / _MARK).write_text(_MARK)
        here = NodeReport(**look(folder, "own", list(paths)))
        nodes = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        remote = ray.remote(num_cpus=0, max_retries=0)(look)
        asked = {
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                folder, node, list(paths)
            ): node
            for node in nodes
        }
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        problems = [f"{nodes[asked[answer]]} did not answer within {timeout_s:.0f} s" for answer in late]
        for answer in ready:
            node = asked[answer]
            problems += [f"{nodes[node]} {problem}" for problem in _problems(here, answer, probe / node)]
    return sorted(problems)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"


def _problems(here: NodeReport, answer: Any, written: Path) -> list[str]:
    """Return in what a node's answer differs from what this process sees."""
    import ray

    try:
        there = NodeReport(**ray.get(answer))
    except ray.exceptions.RayError as error:
        return [f"could not look: {str(error).strip().splitlines()[-1]}"]
    problems = [
        f"has {name} {there.versions[name]}, not {version}"
        for name, version in here.versions.items()
        if there.versions[name] != version
    ]
    problems += [f"does not see {path}" for path in there.missing]
    storage = written.parent.parent
    if not there.sees_mark:
        problems.append(f"does not see this machine's {storage}")
    elif there.refused is not None:
        problems.append(f"cannot write to {storage}: {there.refused}")
    elif not written.is_file():
        problems.append(f"writes to another {storage} than this machine's")
    return problems


def _make_report() -> Callable[[str, str, list[str]], dict[str, Any]]:
    """Return what runs on the nodes. As a local function it travels whole: a node may have another segadapt or none."""
    mark = _MARK

    def look(folder: str, name: str, paths: list[str]) -> dict[str, Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import platform
        from pathlib import Path

        def version(package: str) -> str:
            try:
                return importlib.metadata.version(package).partition("+")[0]  # builds for CPU and GPU may be mixed
            except importlib.metadata.PackageNotFoundError:
                return "(none)"

        def code() -> str:
            digest = hashlib.sha256()
            for part in ("platform", "search_spaces", "trainables"):
                spec = importlib.util.find_spec(f"segadapt.{part}")
                for root in spec.submodule_search_locations or () if spec else ():
                    for path in sorted(Path(root).rglob("*.py")):
                        digest.update(f"{part}/{path.relative_to(root)}\n".encode() + path.read_bytes())
            return digest.hexdigest()[:8]

        versions = {package: version(package) for package in ("ray", "torch")}
        versions["Python"] = ".".join(platform.python_version_tuple()[:2])
        segadapt = version("segadapt")
        versions["segadapt"] = segadapt if segadapt == "(none)" else f"{segadapt} (files {code()})"
        refused = None
        try:
            sees_mark = (Path(folder) / mark).read_text() == mark
        except OSError:
            sees_mark = False
        if sees_mark:
            try:
                (Path(folder) / name).write_text(name)
            except OSError as error:
                refused = error.strerror
        missing = [path for path in paths if not Path(path).exists()]
        return {"versions": versions, "missing": missing, "sees_mark": sees_mark, "refused": refused}

    return look
