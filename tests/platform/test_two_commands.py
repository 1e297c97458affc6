"""Two commands at once on one experiment or one storage folder: one of them acts, or both do and lose nothing."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import optuna
import pytest
from commands import COMMAND, forked
from conftest import TINY, TINY_WORDS
from searching import Watched, steps_of, tracked

import segadapt
from segadapt import Place, UsageError
from segadapt.platform.experiment.finishing import FinishRequest, plan_finish
from segadapt.platform.experiment.naming import begun, claim_on_servers
from segadapt.platform.experiment.planning import SearchRequest, plan_search
from segadapt.platform.storage.driving import driving
from segadapt.platform.storage.files import write_whole

NAME = Watched.NAME

ALONE = "One command at a time must work on an experiment, but process .* works on"


@pytest.fixture(scope="module")
def place(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A storage folder with a search that has ended."""
    root = tmp_path_factory.mktemp("two") / "runs"
    watched.copy_storage(root)
    return Place(root)


@pytest.fixture
def driven(place: Place) -> Iterator[Place]:
    """One in which a command works on the search."""
    with driving(place.folders, NAME):
        yield place


def contents(place: Place) -> dict[str, bytes]:
    root = place.folders.root
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and "locks" not in path.parts}


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (lambda place: segadapt.search(resume=NAME, place=place), ALONE),
        (lambda place: segadapt.search(extend=NAME, trials=1, place=place), ALONE),
        (lambda place: segadapt.search(resume=NAME, rerank=2, seeds=2, place=place), ALONE),
        (lambda place: segadapt.search(resume=NAME, keep_top=1, place=place), ALONE),
        (lambda place: segadapt.train(resume=NAME, place=place), ALONE),
        (lambda place: segadapt.search("sdca", TINY, name=NAME, place=place), "--name must be new, but"),
        (lambda place: segadapt.train("sdca", TINY, name=NAME, place=place), "--name must be new, but"),
    ],
    ids=["resume", "extend", "rerank", "keep top", "train --resume", "search --name", "train --name"],
)
def test_what_would_work_on_an_experiment_that_is_worked_on_is_refused_and_touches_nothing(
    command: Callable[[Place], object], refusal: str, driven: Place
) -> None:
    before = contents(driven)
    with pytest.raises(UsageError, match=refusal):
        command(driven)
    assert contents(driven) == before


def test_the_same_finish_twice_at_once_is_refused_and_another_one_is_not(place: Place) -> None:
    first, second = (plan_finish(FinishRequest("best", NAME, {"seed": seed}), place)[0].name for seed in (1, 2))
    assert first != second
    with (
        driving(place.folders, first),
        driving(place.folders, second),
        pytest.raises(UsageError, match=f"{ALONE} '{first}'"),
    ):
        segadapt.finish("best", NAME, {"seed": 1}, place=place)


@pytest.mark.parametrize(
    "command",
    [
        lambda place, folder: segadapt.runs(NAME, selection=True, place=place).rows,
        lambda place, folder: segadapt.report(NAME, str(folder / "page.html"), place=place),
        lambda place, folder: segadapt.status(NAME, place=place),
        lambda place, folder: segadapt.cache_list(place=place).stages,
        lambda place, folder: segadapt.cache_prune(everything=True, dry_run=True, place=place),
        lambda place, folder: segadapt.plan("sdca", TINY, place=place).record.name == f"{NAME}-2",
        lambda place, folder: segadapt.plan(fork=NAME, trials=1, place=place).record.forked_from == NAME,
    ],
    ids=["runs", "report", "status", "cache list", "cache prune", "plan", "fork"],
)
def test_what_only_looks_at_an_experiment_goes_on_beside_what_works_on_it(
    command: Callable[[Place, Path], Any], driven: Place, tmp_path: Path
) -> None:
    assert command(driven, tmp_path)


def begin(root: Path, ready: Path, names: Path) -> None:
    """Begin a search of the usual name, together with others, and write down what it is called."""
    place = Place(root)
    record = plan_search(SearchRequest(methods=["sdca"], settings=TINY), place)
    (ready / record.name).mkdir(exist_ok=True)
    with begun(record, place, named=False) as taken:
        (names / taken.name).mkdir()
        place.folders.experiment(taken.name).mkdir(parents=True)


def test_searches_that_begin_at_once_each_have_a_name_of_their_own(tmp_path: Path) -> None:
    ready, names = tmp_path / "ready", tmp_path / "names"
    ready.mkdir()
    names.mkdir()
    processes = [forked(begin, tmp_path / "runs", ready, names) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert {path.name for path in names.iterdir()} == {NAME, *(f"{NAME}-{number}" for number in range(2, 7))}


def test_a_planned_search_whose_name_was_taken_takes_another_one_unless_it_was_asked_for(tmp_path: Path) -> None:
    place = Place(tmp_path / "runs")
    usual = segadapt.plan("sdca", TINY, place=place)
    named = segadapt.plan("sdca", TINY, name=NAME, place=place)
    with begun(usual.record, place, named=usual.named) as first:
        assert first.name == NAME
        with begun(usual.record, place, named=usual.named) as second:
            assert second.name == f"{NAME}-2"
        with pytest.raises(UsageError, match="--name must be new, but"):
            named.run()
    assert not list(place.folders.root.glob("ray/*")), "a search that did not begin leaves its name free"


def test_searches_of_two_storage_folders_share_no_study_in_one_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    first, second = (Place(tmp_path / name, study_uri=url) for name in ("first", "second"))
    record = plan_search(SearchRequest(methods=["sdca"], settings=TINY), first)
    with begun(record, first, named=False):
        claim_on_servers(record, first)
    optuna.load_study(study_name=NAME, storage=url).enqueue_trial({})
    with begun(record, second, named=False) as other:
        assert other.name == f"{NAME}-2"
    with pytest.raises(UsageError, match=r"--name must be new, but .* among the studies"):
        begun(record, second, named=True).__enter__()
    with pytest.raises(UsageError, match="was taken among the studies of --study-uri just now"):
        claim_on_servers(record, second)
    assert len(optuna.load_study(study_name=NAME, storage=url).trials) == 1


def at_once(*commands: Callable[[], object]) -> list[object]:
    """Run commands in threads that begin together; returns what each returned or raised."""
    together = threading.Barrier(len(commands))

    def run(command: Callable[[], object]) -> object:
        together.wait()
        try:
            return command()
        except UsageError as error:
            return error

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run, commands))


def test_reports_and_other_files_that_are_written_at_once_are_whole(tmp_path: Path) -> None:
    pages = [str(number) * 100_000 for number in range(4)]
    for _ in range(20):
        at_once(*(lambda page=page: write_whole(tmp_path / "page.html", page) for page in pages))
        assert (tmp_path / "page.html").read_text() in pages
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_of_two_writers_of_a_dataset_into_one_folder_one_writes_it(tmp_path: Path) -> None:
    small = {key: value for key, value in TINY.items() if key.startswith("data.")}
    folder = str(tmp_path / "town")
    made = at_once(*(lambda: segadapt.data_make(folder, small),) * 3)
    assert sorted(type(outcome).__name__ for outcome in made) == ["PosixPath", "UsageError", "UsageError"]
    assert segadapt.data_check("folder", str(tmp_path / "town" / "source")).faults == ()
    assert [path.name for path in tmp_path.iterdir()] == ["town"]


def test_prunes_that_run_at_once_remove_each_stage_once(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.folders.root / "stages", tmp_path / "runs" / "stages")
    other = Place(tmp_path / "runs")
    stages = {stage.hash for stage in segadapt.cache_list(place=other).stages}
    pruned = at_once(*(lambda: segadapt.cache_prune(everything=True, place=other),) * 3)
    removed = [stage.hash for outcome in pruned for stage in outcome.stages]  # type: ignore[attr-defined]
    assert sorted(removed) == sorted(stages)
    assert segadapt.cache_list(place=other).stages == []


def test_a_search_that_runs_cannot_be_resumed_and_ends_as_if_nobody_had_tried(watched: Watched) -> None:
    assert watched.resumed.returncode == 2
    assert "One command at a time must work on an experiment" in watched.resumed.stderr
    assert "Traceback" not in watched.resumed.stderr
    assert {run.info.status for run in tracked(watched.left.parent, NAME).values()} == {"FINISHED"}


@pytest.mark.slow
def test_two_searches_started_at_the_same_moment_run_apart(warm: Path) -> None:
    words = [COMMAND, "search", "sdca", "--trials", "1", "--launcher", "inprocess", *TINY_WORDS]
    searches = [Popen(words, cwd=warm, stdout=PIPE, stderr=STDOUT, text=True) for _ in range(2)]
    said = [search.communicate(timeout=600)[0] for search in searches]
    assert [search.returncode for search in searches] == [0, 0], "\n".join(said)
    for name in (NAME, f"{NAME}-2"):
        runs = tracked(warm, name)
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert steps_of(warm, runs["sdca-001"]) == [2, 4, 6, 8], "every step once"
        assert json.loads((warm / "runs" / "ray" / name / "record.json").read_text())["name"] == name
    assert [finding.text for finding in segadapt.doctor(place=Place(warm / "runs")) if finding.level == "fault"] == []
