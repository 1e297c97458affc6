"""Every option that is typed acts or is refused by name, beside the ones that name an experiment that exists."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

import segadapt
from segadapt.platform.api import training
from segadapt.platform.api.training import Plan
from segadapt.platform.cli import search
from segadapt.platform.cli.main import app, main
from segadapt.platform.experiment.record import Options, Record
from segadapt.platform.settings.resources import Resources, Tolerance
from segadapt.platform.storage.folders import Place

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

TEXTS = {
    "--address": "auto",
    "--config": "experiment.yaml",
    "--extend": "other",
    "--fork": "other",
    "--launcher": "train",
    "--name": "fresh",
    "--objective": "source_val/miou",
    "--preset": "quick",
    "--resume": "other",
    "--sampler": "random",
    "--scheduler": "median",
    "--storage": "elsewhere",
    "--study-uri": "sqlite:///studies.db",
    "--tracking-uri": "http://127.0.0.1:9",
    "--warm-start": "other",
}
"""A sensible value of each option that takes a text; a new one must be added, or the test fails."""

AS_IT_IS = [("fork", ["--rerank", "0"])]
"""What asks for that which is so anyway."""

SPELLED = {
    "--config": ("An experiment file",),
    "--name": ("A name must be",),
    "--resume": ("A name must be",),
    "--extend": ("A name must be",),
    "--fork": ("A name must be",),
    "--warm-start": ("A name must be",),
}
"""How refusals of an empty text name the option, where they do not spell it."""


def words_of(command: str, option: Any) -> Iterator[list[str]]:
    """What may be typed for an option: as a flag, or with a falsy and a truthy value."""
    name = option.opts[0]
    annotated = inspect.signature(getattr(search, command)).parameters[option.name].annotation
    types = re.findall(r"bool|int|float|str", str(get_args(annotated)[0]))
    if "bool" in types:
        yield [name]
        return
    values = {"int": ("0", "5"), "float": ("0", "7.5"), "str": ("", TEXTS.get(name))}[types[-1]]
    assert None not in values, f"TEXTS needs a value for {name}"
    yield from ([name, str(value)] for value in values)


def typed(command: str, begun: str) -> Iterator[Any]:
    """All that may be typed beside `begun`."""
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option" and parameter.name not in (begun, "help", "help_all"):
            yield from words_of(command, parameter)
    yield ["sdca"]
    if command == "search" or begun == "resume":
        yield ["sdca", "method.temperature=3"] if command == "train" else ["method.temperature=3"]


CASES = [
    (command, begun, words)
    for command, begun in [*product(["search"], ["resume", "extend", "fork"]), ("train", "resume")]
    for words in typed(command, begun)
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with searches and a run that have begun, in the storage folders `runs` and `elsewhere` and here."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"method": {"output_gain": 2.0}}))
    for place in (Place(folder), Place(folder / "runs"), Place(folder / "elsewhere")):
        for name in ("begun", "other"):
            choices: Any = {"seed": 7, "rerank": 2, "seeds": 3, "keep_top": 4, "scheduler": "asha-promote"}
            segadapt.plan("sdca", {"seed": 1}, name=name, place=place, **choices).record.save(place.folders)
        record = segadapt.plan("sdca", name="single", place=place).record
        dataclasses.replace(record, kind="train", name="single", trials=1).save(place.folders)
    return folder


def outcome(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> tuple[Record, Options] | int:
    """What a command line would run, and how; or the status with which it was refused."""
    would_run = []

    def note(record: Record, options: Options) -> None:
        would_run.append((record, dataclasses.replace(options, say=print)))
        sys.exit(99)

    for name in ("run", "estimate"):
        monkeypatch.setattr(Plan, name, lambda plan: note(plan.record, plan.options))
    monkeypatch.setattr(training, "_gone_on", lambda plan, options: note(plan(), options))
    monkeypatch.setattr("sys.argv", ["segadapt", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return would_run[0] if would_run else int(str(ended.value.code))


@pytest.mark.parametrize(
    ("command", "option", "words"), CASES, ids=lambda part: "_".join([part] if isinstance(part, str) else part)
)
def test_what_is_typed_beside_an_experiment_that_exists_acts_or_is_refused_by_name(
    command: str,
    option: str,
    words: list[str],
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(begun)
    base = [command, f"--{option}", "single" if command == "train" else "begun"]
    files = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    without = outcome(monkeypatch, base)
    capsys.readouterr()
    result = outcome(monkeypatch, [*base, *words])
    shown = capsys.readouterr()
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == files, "nothing may be touched"
    if isinstance(result, int):
        assert result == 2
        names = [
            words[0],
            *(word for word in words if "=" in word),
            *(SPELLED.get(words[0], ()) if "" in words else ()),
        ]
        assert any(name in shown.err for name in names), shown.err
    elif words == ["--dry-run"]:
        assert "\nsearched:\n" in shown.out
    elif (option, words) not in AS_IT_IS:
        assert result != without, f"{words} was dropped silently"


ALONE = [
    (("search", "sdca", "--seeds", "3"), "--seeds must come with --rerank K"),
    (("search", "sdca", "--seeds", "0"), "--seeds must come with --rerank K"),
    (("search", "sdca", "--rerank", "0", "--seeds", "3"), "got --seeds 3 and --rerank 0"),
    (("search", "sdca", "--rerank", "2", "--seeds", "0"), "--seeds at least 2"),
    (("search", "sdca", "--rerank", "-1"), "--rerank must not be negative"),
    (("search", "sdca", "--keep-top", "0"), "--keep-top must be at least 1"),
    (("search", "sdca", "--time-budget", "0"), "--time-budget and --max-gpu-hours must be positive"),
    (("search", "sdca", "--concurrent", "0"), "--concurrent, --time-budget"),
    (("search", "sdca", "--preset", ""), "--preset of sdca must be one of"),
    (("search", "sdca", "--objective", ""), "--objective must be one of"),
    (("search", "sdca", "--sampler", ""), "--sampler must be one of"),
    (("search", "sdca", "--scheduler", ""), "--scheduler must be one of"),
    (("search", "sdca", "--name", ""), "A name must be"),
    (("search", "sdca", "--resume", ""), "--resume takes methods and settings from the search ''"),
    (("search", "sdca", "--tracking-uri", ""), "--tracking-uri must be an address"),
    (("search", "sdca", "--study-uri", ""), "--study-uri must be an address"),
    (("search", "sdca", "--skip-bad", "data.skip_bad=false"), "--skip-bad sets data.skip_bad=true"),
    (("search", "sdca", "--max-failures", "-1", "--dry-run"), "--max-failures must not be negative"),
    (("train", "sdca", "--preset", ""), "--preset of sdca must be one of"),
    (("train", "sdca", "--workers-per-trial", "0"), "--workers-per-trial 0"),
    (("finish", "best", "--search", "x", "--rounds", "2", "method.rounds=3"), "--rounds sets method.rounds"),
    (("finish", "best", "--search", "x", "--seeds", "0"), "--seeds must be at least 1"),
    (("logs", "job", "--json"), "go with --search, for the log of a trial, but got --json"),
    (("logs", "job", "--storage", "runs"), "go with --search, for the log of a trial, but got --storage"),
    (("logs", "trial", "--search", "x", "--address", "http://127.0.0.1:9"), "--address names the cluster of a job"),
    (
        ("predict", "model.onnx", "photos", "out", "--search", "x"),
        "--search, --storage and --tracking-uri say where a run",
    ),
    (
        ("predict", "model.onnx", "photos", "out", "--storage", "x"),
        "--search, --storage and --tracking-uri say where a run",
    ),
    (("data", "pack", "folder", "town", "out", "--quality", "50"), "--quality must come with --format jpeg"),
    (
        ("data", "pack", "folder", "town", "out", "--split", "val", "--size", "32", "64"),
        "--size resizes the split train alone",
    ),
    (("cache", "prune", "--older-than", "0", "--all"), "Either --older-than DAYS"),
    (("runs", "x", "--storage", ""), "--storage must be a path, but got ''"),
    (("runs", "x", "--tracking-uri", ""), "--tracking-uri must be an address"),
    (("status", "x", "--study-uri", ""), "--study-uri must be an address"),
    (("report", "x", "--out", ""), "--out must be a path"),
    (("export", "best", "--search", "x", "--out", ""), "--out must be a path"),
    (("evaluate", "best", "--search", "x", "--save-predictions", ""), "--save-predictions must be a path"),
    (("predict", "model.onnx", "", "out"), "IMAGES must be a path"),
    (("predict", "model.onnx", "photos", ""), "OUT must be a path"),
    (("data", "make", ""), "FOLDER must be a path"),
    (("data", "check", "folder", ""), "ROOT must be a path"),
    (("data", "pack", "folder", "town", ""), "OUT must be a path"),
    (("data", "show", ""), "PATH must be a path"),
]


@pytest.mark.parametrize(
    ("words", "message"), ALONE, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_what_cannot_act_is_refused_by_name(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(monkeypatch, list(words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_notebook_gets_the_words_of_the_command_line(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(begun)
    calls = [
        (
            lambda: segadapt.search("sdca", resume="begun", place=place),
            "--resume takes methods and settings .* got sdca",
        ),
        (lambda: segadapt.search(resume="begun", seed=0, place=place), "--resume takes .* got --seed"),
        (lambda: segadapt.search(extend="begun", concurrent=0, place=place), "--extend takes .* got --concurrent"),
        (
            lambda: segadapt.search(fork="begun", preset="quick", place=place),
            "--fork takes its methods .* got --preset",
        ),
        (lambda: segadapt.plan(resume="begun", place=place), r"--resume takes .* got --dry-run \(in Python: `plan`\)"),
        (lambda: segadapt.train("sdca", {"seed": 0}, resume="single", place=place), "got sdca seed=0"),
        (lambda: Resources(workers=0), "--workers-per-trial 0"),
        (lambda: Tolerance(max_failures=-1), "--max-failures must not be negative"),
    ]
    for call, message in calls:
        with pytest.raises(segadapt.UsageError, match=message):
            call()
    assert capsys.readouterr().out == "", "nothing was started"


def test_an_empty_address_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(segadapt.UsageError, match="--address must be auto or HOST:PORT"):
        segadapt.train("source_only", address="", place=Place(tmp_path))


def test_no_command_has_two_options_of_one_name() -> None:
    def leaves(commands: dict[str, Any]) -> Iterator[Any]:
        for command in commands.values():
            yield from leaves(command.commands) if hasattr(command, "commands") else [command]

    for command in leaves(COMMANDS):
        names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        assert len(names) == len(set(names)), command.name


def test_a_group_of_options_that_a_command_has_already_is_a_fault_of_the_code() -> None:
    from segadapt.platform.cli.options import folder, shared

    def command(place: Place, storage: str = "runs") -> None: ...

    with pytest.raises(TypeError, match="twice storage"):
        shared(place=folder)(command)
    with pytest.raises(TypeError, match="must have the parameters where"):
        shared(where=folder)(command)
