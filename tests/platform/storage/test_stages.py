"""The stage cache under processes that want the same at the same time, die, or stand still."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_WORDS

import segadapt as api
from segadapt import trainables
from segadapt.platform.cli.main import main
from segadapt.platform.settings.config import resolve
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.storage import cache, leases, stages
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.stage_keys import StageKey
from segadapt.platform.storage.stages import (
    Description,
    find,
    lease_folder,
    longest_prefix,
    mark_used,
    need,
    need_no_more,
    turn_to_compute,
)
from segadapt.platform.trial.spec import TrialSpec
from segadapt.platform.trial.training import train
from segadapt.trainables.core.method import SOURCE_ONLY, Stage
from segadapt.trainables.core.training.checkpoint import MANIFEST, load_state

fork = multiprocessing.get_context("fork")  # children start at once: torch is there already


def key(name: str, parent: str | None = None) -> StageKey:
    return StageKey(Stage(name=name), name.ljust(32, "0"), parent)


WARM_UP = key("warm")
CHAINS = [[WARM_UP, key("a", WARM_UP.hash)], [WARM_UP, key("b", WARM_UP.hash)]]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    found = Storage(tmp_path)
    found.stages.mkdir()
    found.experiments.mkdir()
    return found


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(stages, "_POLL_S", 0.05)


@pytest.fixture
def started() -> Iterator[Callable[..., BaseProcess]]:
    """Start a function in a process of its own; ends what is left at the end."""
    processes: list[BaseProcess] = []

    def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = fork.Process(target=target, args=arguments)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


Started = Callable[..., BaseProcess]


def wait_for(condition: Callable[[], object], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def publish(storage: Storage, stage: StageKey, experiment: str = "e", content: str = "{}") -> Path:
    checkpoint = storage.root / f"checkpoint-{os.getpid()}-{stage.hash}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / MANIFEST).write_text(content)
    description = Description(
        stage.stage.name, "sdca", "streets", "compact", 0, 4, experiment, time.time(), stage.parent
    )
    stages.publish(storage, stage, checkpoint, description)
    return storage.stages / stage.hash


def note(storage: Storage, text: str) -> None:
    with (storage.root / "log").open("a") as log:
        log.write(text + "\n")


def noted(storage: Storage) -> list[str]:
    path = storage.root / "log"
    return path.read_text().splitlines() if path.exists() else []


def drive(storage: Storage, chain: Sequence[StageKey], seconds: float, experiment: str) -> None:
    """Do as a driver does: compute what is missing of a chain, each stage in so many seconds."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    say = lambda text: note(storage, f"{experiment}: {text}")  # noqa: E731
    with turn_to_compute(storage, chain, experiment, say) as done:
        for stage in chain[len(done) :]:
            note(storage, f"computes {stage.stage.name}")
            time.sleep(seconds)
            publish(storage, stage, experiment)
    assert len(longest_prefix(storage, chain)) == len(chain)
    note(storage, "has all")


def hold(storage: Storage, stage: StageKey, seconds: float) -> None:
    """Hold the lease of a stage without computing it."""
    lease = leases.take(lease_folder(storage, stage.hash), leases.Owner("holder", stage.stage.name))
    assert isinstance(lease, leases.Lease)
    note(storage, "holds")
    time.sleep(seconds)
    note(storage, f"held {lease.held}")
    lease.release()


def test_processes_that_need_the_same_stages_at_once_compute_each_once(storage: Storage, started: Started) -> None:
    drivers = [started(drive, storage, CHAINS[number % 2], 0.3, f"e{number}") for number in range(4)]
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0] * 4
    computed = sorted(line for line in noted(storage) if line.startswith("computes "))
    assert computed == ["computes a", "computes b", "computes warm"]
    assert any("Waiting for the stage warm, which e" in line for line in noted(storage))
    assert cache.content(storage).leases == [], "all are released"


def test_a_killed_holder_is_taken_over_by_one_waiter(
    storage: Storage, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_AFTER_S", 2.0)
    owner = started(hold, storage, WARM_UP, 600)
    wait_for(lambda: noted(storage))
    waiters = [started(drive, storage, chain, 0.2, f"e{number}") for number, chain in enumerate(CHAINS)]
    wait_for(lambda: sum("Waiting for the stage warm, which holder" in line for line in noted(storage)) == 2)
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    for waiter in waiters:
        waiter.join()
    lines = noted(storage)
    assert lines.count("has all") == 2
    assert lines.count("computes warm") == 1
    assert sum("gave no sign for" in line for line in lines) == 1


def test_a_slow_holder_is_left_in_peace_and_one_that_fails_is_replaced(
    storage: Storage, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_AFTER_S", 2.0)
    owner = started(hold, storage, WARM_UP, 4)  # computes nothing and gives the lease back, as one that fails does
    wait_for(lambda: noted(storage))
    waiter = started(drive, storage, CHAINS[0], 0.1, "e")
    owner.join()
    waiter.join()
    lines = noted(storage)
    assert "held True" in lines
    assert lines.index("held True") < lines.index("computes warm")
    assert not any("gave no sign" in line for line in lines)
    assert "has all" in lines


def test_a_holder_that_stood_still_does_not_end_the_lease_of_its_successor(
    storage: Storage, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_AFTER_S", 1.0)
    owner = started(hold, storage, WARM_UP, 0.5)
    wait_for(lambda: noted(storage))
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGSTOP)
    folder = lease_folder(storage, WARM_UP.hash)
    taken: list[leases.Lease] = []
    wait_for(
        lambda: (
            isinstance(found := leases.take(folder, leases.Owner("e", "warm")), leases.Lease)
            and not taken.append(found)
        )
    )
    os.kill(owner.pid, signal.SIGCONT)
    owner.join()
    assert "held False" in noted(storage)
    assert taken[0].held
    found = leases.take(folder, leases.Owner("third", "warm"))
    assert isinstance(found, leases.Held)
    assert found.owner.experiment == "e"
    taken[0].release()
    assert leases.holder_of(folder) is None


def test_waiting_can_be_interrupted(storage: Storage, started: Started) -> None:
    with leases.take(lease_folder(storage, WARM_UP.hash), leases.Owner("e", "warm")):  # type: ignore[union-attr]
        waiter = started(drive, storage, CHAINS[0], 0.1, "waiter")
        wait_for(lambda: any("Waiting" in line for line in noted(storage)))
        assert waiter.pid is not None
        os.kill(waiter.pid, signal.SIGINT)
        waiter.join(timeout=30)
        assert waiter.exitcode == 1


def contend(folder: Path, turns: int, seed: int) -> None:
    """Take the lease again and again; half the time die with it, so that it is stale for the others at once."""
    inside = folder.parent / "inside"
    for turn in range(turns):
        lease = leases.take(folder, leases.Owner(str(seed), "s"))
        while isinstance(lease, leases.Held):
            lease = leases.take(folder, leases.Owner(str(seed), "s"))
        with inside.open("x"):  # raises if somebody else is inside
            assert lease.held
        with (folder.parent / "turns").open("a") as file:
            file.write("t")
        inside.unlink()
        if (turn + seed) % 2:
            lease.release()
        else:
            lease._stop.set()
            lease._thread.join()
            os.utime(folder / str(lease._number), (0, 0))


def test_at_most_one_holds_a_lease_whatever_the_order(tmp_path: Path, started: Started) -> None:
    processes = [started(contend, tmp_path / "lease", 40, seed) for seed in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert (tmp_path / "turns").stat().st_size == 8 * 40
    assert len(list((tmp_path / "lease").iterdir())) == 1, "only the last record is kept"


def test_an_edit_of_what_computes_a_stage_gives_it_another_key(tmp_path: Path) -> None:
    package = tmp_path / "segadapt"
    shutil.copytree(Path(trainables.__file__).parent, package / "trainables")
    (package / "platform" / "storage").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(stages.__file__).with_name("source_hash.py"), package / "platform" / "storage")
    script = """
import sys
from pathlib import Path
from segadapt.platform.storage import source_hash as sources
from segadapt.platform.storage.source_hash import source_hash
root = Path(sys.argv[1])
assert root in Path(sources.__file__).parents
def hashes():
    for cached in (source_hash, sources._imported):
        cached.cache_clear()
    return source_hash(("segadapt.trainables.core.training.trainer",)), source_hash(("segadapt.trainables.sdca",))
print(*hashes())
for name in ("sdca.py", "core/losses/cycle_association.py", "core/losses/segmentation.py"):
    path = root / "segadapt" / "trainables" / name
    path.write_text(path.read_text() + "# edited")
    print(*hashes())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    first, method, other, shared = [line.split() for line in done.stdout.splitlines()]
    assert method[0] == first[0], "the warm-up does not depend on a method's file"
    assert method[1] != first[1]
    assert other == method, "nor on another method's loss"
    assert shared[0] != other[0]
    assert shared[1] != other[1]


def age(folder: Path, days: float) -> None:
    for path in (folder, *folder.iterdir()):
        os.utime(path, (time.time() - 86400 * days,) * 2)


def test_pruning_removes_what_nobody_used_or_needs(storage: Storage, started: Started) -> None:
    names = ("recent", "unused", "needed", "loaded", "leased")
    folders = {name: publish(storage, key(name)) for name in names}
    for folder in folders.values():
        age(folder, 10)
    age(folders["recent"], 1)
    mark_used(folders["loaded"])
    (storage.experiments / "unfinished").mkdir()
    need(storage, "unfinished", [key("needed")])
    left_over = storage.stages / f".{key('x').hash}.1"
    left_over.mkdir()
    (left_over / "state.pt").write_bytes(bytes(1000))
    age(left_over, 1)
    in_work = storage.stages / f".{key('y').hash}.2"
    in_work.mkdir()
    dead = lease_folder(storage, key("dead").hash)
    lost = leases.take(dead, leases.Owner("lost", "dead"))
    assert isinstance(lost, leases.Lease)
    lost._stop.set()
    lost._thread.join()
    os.utime(dead / "1", (0, 0))
    holder = started(hold, storage, key("leased"), 600)
    wait_for(lambda: noted(storage))

    listed = api.cache_list(place=Place(str(storage.root)))
    assert {stage.hash.rstrip("0"): stage.needed_by for stage in listed.stages if stage.needed_by} == {
        "needed": ["unfinished"],
        "leased": [f"holder (process {holder.pid} on {leases.Owner('', '').host})"],
    }
    assert listed.stages[0].hash == key("loaded").hash, "the last used first"
    assert {lease.stage: lease.alive for lease in listed.leases} == {"dead": False, "leased": True}
    assert listed.bytes == sum(stage.bytes for stage in listed.stages) > 0

    before = sorted(storage.stages.rglob("*"))
    dry = api.cache_prune(older_than_days=5, dry_run=True, place=Place(str(storage.root)))
    assert sorted(storage.stages.rglob("*")) == before
    pruned = api.cache_prune(older_than_days=5, place=Place(str(storage.root)))
    for found in (dry, pruned):
        assert [stage.hash for stage in found.stages] == [key("unused").hash]
        assert {stage.hash for stage in found.kept} == {key("needed").hash, key("leased").hash}
        assert [lease.stage for lease in found.leases] == ["dead"]
        assert found.left_over == [left_over.name]
        assert found.bytes > 1000
    assert {name for name, folder in folders.items() if folder.exists()} == {"recent", "needed", "loaded", "leased"}
    assert in_work.exists()
    assert leases.holder_of(dead) is None

    holder.kill()
    need_no_more(storage, "unfinished")
    os.utime(lease_folder(storage, key("leased").hash) / "1", (0, 0))
    rest = api.cache_prune(everything=True, place=Place(str(storage.root)))
    assert len(rest.stages) == 4
    assert api.cache_list(place=Place(str(storage.root))).stages == []


def test_a_stage_that_is_needed_at_the_last_moment_stays(storage: Storage) -> None:
    folder = publish(storage, WARM_UP)
    (storage.experiments / "late").mkdir()
    need(storage, "late", [WARM_UP])
    assert not cache._remove(storage, WARM_UP.hash)
    assert find(storage, WARM_UP) == folder


DRIVER = """
from segadapt.platform.cli.main import main
from segadapt.platform.storage import leases
leases.STALE_AFTER_S, leases.RENEWED_EVERY_S = 6.0, 0.5
main()
"""


@pytest.mark.slow
def test_drivers_compute_a_stage_once_when_the_first_of_them_is_killed(tmp_path: Path) -> None:
    outputs = {}
    drivers = {}

    def start(name: str, *words: str) -> None:
        outputs[name] = tmp_path / f"{name}.txt"
        with outputs[name].open("w") as output:
            command = [sys.executable, "-c", DRIVER, "train", *words]
            drivers[name] = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)

    storage = Storage(tmp_path / "runs")
    try:
        for name, method in (("first", "bicl"), ("second", "drsl")):
            start(name, method, "--name", name, *TINY_WORDS)
        held: list[leases.Held] = []
        wait_for(lambda: held.extend(filter(None, map(leases.holder_of, storage.stages.glob(".leases/*")))) or held)
        killed = held[0].owner.experiment
        assert drivers[killed].pid == held[0].owner.pid
        drivers[killed].kill()
        (survivor,) = set(drivers) - {killed}
        assert drivers[survivor].wait(timeout=600) == 0, outputs[survivor].read_text()
        assert "gave no sign for" in outputs[survivor].read_text()
        start("resumed", "--resume", killed)
        assert drivers["resumed"].wait(timeout=600) == 0, outputs["resumed"].read_text()
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.wait()
    assert "stages computed earlier are loaded: source_only." in outputs["resumed"].read_text()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.mlflow_database}")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    stage_runs = [run for run in runs if run.data.tags["segadapt.kind"] == "stage"]
    assert [run.info.status for run in stage_runs].count("FINISHED") == 1
    assert "RUNNING" not in {run.info.status for run in runs}
    hits = sorted(
        run.data.tags["segadapt.cache.source_only"] for run in runs if run.data.tags["segadapt.kind"] == "train"
    )
    assert hits == ["computed here", "hit"]

    (kept,) = api.cache_list(place=Place(str(storage.root))).stages
    assert kept.needed_by == [], "all experiments finished"
    assert kept.description is not None
    assert (kept.description.stage, kept.description.data, kept.description.steps) == ("source_only", "streets", 4)
    alone = Storage(tmp_path / "alone")
    spec = TrialSpec(
        alone, "alone", {"bicl": resolve("bicl", TINY)}, Allocation(cpus=os.cpu_count() or 1), shared_stages=True
    )
    train(spec.trial("alone", {}), lambda reported, write: write_to(tmp_path / "checkpoint", write), None)
    undisturbed, taken_over = (load_state(root.stages / kept.hash)["state"] for root in (alone, storage))
    network = [name for name in undisturbed if name.startswith("segmenter.")]
    assert network
    for name in network:
        torch.testing.assert_close(taken_over[name], undisturbed[name])


def write_to(folder: Path, write: Callable[[Path], None] | None) -> None:
    assert write is not None
    folder.mkdir(exist_ok=True)
    write(folder)


def test_the_cache_commands_print_what_there_is(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def segadapt(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["segadapt", "cache", *words, "--storage", str(storage.root)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return f"{ended.value.code} {printed.out}{printed.err}"

    publish(storage, StageKey(SOURCE_ONLY, "0" * 32))
    listed = segadapt("list")
    for expected in ("source_only", "streets", "compact", "1 stages"):
        assert expected in listed
    content = json.loads(segadapt("list", "--json").removeprefix("0 "))
    assert content["stages"][0]["description"]["stage"] == "source_only"
    assert segadapt("prune").startswith("2 error: Either --older-than DAYS, not negative, or --all must be given")
    assert "would be removed: 000000000000 source_only" in segadapt("prune", "--all", "--dry-run")
    pruned = segadapt("prune", "--all")
    assert "removed: 000000000000 source_only" in pruned
    assert "freed" in pruned
