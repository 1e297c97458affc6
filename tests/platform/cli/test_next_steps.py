"""What commands, the report and MLflow's pages say to do next works when it is pasted, in a storage of any name."""

import html
import inspect
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
from commands import run_command
from conftest import TINY_WORDS
from searching import Watched, tracked

from segadapt.platform.cli.main import app
from segadapt.platform.storage.command_lines import command_line
from segadapt.platform.storage.folders import Place

STORAGE = "my runs (1)"

LONG = ("search", "finish", "train", "ui")
"""Commands that start Ray or a server."""

INTERRUPTED = (130, -signal.SIGINT)
"""Exit statuses after Ctrl-C: of the command, and of a shell that had it beside it."""

BEGUN = r"\d trials done|MLflow shows"
"""What those print once they have begun."""


def next_lines(shown: str) -> list[str]:
    """The commands below each `Next:`."""
    return re.findall(r"^    ((?:uv run )?segadapt .+)$", shown, re.MULTILINE)


def words_of(line: str) -> list[str]:
    """The words that a shell makes of a command, without the program."""
    words = shlex.split(line)
    return words[words.index("segadapt") + 1 :]


@pytest.fixture(scope="module")
def folder(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search in a storage whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("next")
    watched.copy_storage(folder / STORAGE)
    return folder


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[str]:
    """All commands that quick commands say come next, and those that come next after these; each quick one was run."""
    where = ("--storage", STORAGE)
    asked = [
        ("list",),
        ("status", Watched.NAME, *where),
        ("runs", Watched.NAME, *where),
        ("evaluate", "sdca-001", "--search", Watched.NAME, *where),
        ("data", "make", "a town", "data.streets.train_images=2", "data.streets.val_images=1"),
        ("data", "make", "a gta", "--format", "gta5", "data.streets.train_images=2", "data.streets.val_images=1"),
        ("data", "pack", "folder", "a town/source", "packed town"),
    ]
    waiting, known = [shlex.join(["segadapt", *words]) for words in asked], []
    while waiting:
        line = waiting.pop(0)
        if line in known:
            continue
        known.append(line)
        words = words_of(line)
        if words[0] in LONG or words[0] == "export":
            continue
        done = run_command(folder, *words)
        assert done.returncode == 0, (line, done.stderr)
        shown = next_lines(done.stdout)
        assert shown or words[:2] in (["data", "show"],), f"{line} ends with what to do next"
        if words[0] == "report":
            page = (folder / f"{Watched.NAME}.html").read_text()
            shown += [html.unescape(code) for code in re.findall(r"<code>((?:uv run )?segadapt .+?)</code>", page)]
        waiting += shown
    return known[len(asked) :]


def test_every_next_line_works_when_pasted(lines: list[str]) -> None:
    commands = {tuple(words_of(line)[:2]) for line in lines}
    assert {("describe", "sdca"), ("report", Watched.NAME), ("data", "check"), ("data", "show")} <= commands
    assert {("search", "sdca"), ("search", "--resume"), ("finish", "best"), ("export", "sdca-001")} <= commands
    assert ("ui", Watched.NAME) in commands


def hear_ctrl_c() -> None:
    """Let a process end at Ctrl-C, which a shell's background jobs, such as these tests may be, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin(line: str, folder: Path) -> int:
    """Paste a command that takes long into a shell, press Ctrl-C once it has begun, and return its exit status."""
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    shell = Popen(
        line,
        shell=True,
        cwd=folder,
        env=environment,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        process_group=0,
        preexec_fn=hear_ctrl_c,
    )
    assert shell.stdout is not None
    shown = ""
    for text in shell.stdout:
        shown += text
        if re.search(BEGUN, text):
            os.killpg(shell.pid, signal.SIGINT)
            break
    rest, _ = shell.communicate(timeout=240)
    assert re.search(BEGUN, shown), shown + rest
    return shell.returncode


@pytest.mark.slow
def test_every_next_line_that_trains_or_serves_begins_when_pasted(lines: list[str], folder: Path) -> None:
    by_kind = {}  # a new search, one that goes on, and so on: of each, the one with the most words
    for line in sorted(lines, key=len):
        command, *words = words_of(line)
        if command in LONG:
            by_kind[command, words[0] if words[0].startswith("--") else ""] = line
    assert {command for command, _ in by_kind} >= {"search", "finish", "ui"}
    assert any("data.source" in line for line in by_kind.values())
    for line in by_kind.values():
        assert begin(line, folder) in (0, *INTERRUPTED), line


@pytest.mark.slow
def test_what_a_dry_run_and_a_finish_say_comes_next_works_when_pasted(folder: Path) -> None:
    tiny = [word for word in TINY_WORDS if "streets" in word]
    planned = run_command(folder, "search", "sdca", "--dry-run", "--storage", STORAGE, *tiny)
    assert planned.returncode == 0, planned.stderr
    search, plan = next_lines(planned.stdout)
    assert begin(search, folder) in INTERRUPTED
    printed = run_command(folder, *words_of(plan))
    assert printed.returncode == 0, printed.stderr
    assert "height: 32" in printed.stdout
    words = ("--search", Watched.NAME, "--storage", STORAGE, "trainer.steps=2")
    finished = run_command(folder, "finish", "best", *words)
    assert finished.returncode == 0, finished.stderr
    evaluate, export = next_lines(finished.stdout)
    for line in (evaluate, export):
        done = run_command(folder, *words_of(line))
        assert done.returncode == 0, (line, done.stderr)


def test_what_a_search_says_comes_next_is_what_mlflow_says_of_it(watched: Watched) -> None:
    note = tracked(watched.folder, Watched.NAME)[Watched.NAME].data.tags["mlflow.note.content"]
    assert set(next_lines(note)) <= set(next_lines(watched.output))
    assert len(next_lines(note)) == 2


def test_a_command_line_names_the_place_by_the_options_that_its_command_has() -> None:
    place = Place("my runs", tracking_uri="http://me:secret@host", study_uri="postgresql:///studies")
    commands = {entry.name or entry.callback.__name__: entry for entry in app.registered_commands if entry.callback}
    for name, entry in commands.items():
        assert entry.callback is not None
        line = command_line(name, place=place)
        options = {"storage": "--storage", "tracking_uri": "--tracking-uri", "study_uri": "--study-uri"}
        for parameter, option in options.items():
            has = parameter in inspect.signature(entry.callback).parameters
            assert (option in shlex.split(line)) == has, (name, option)
        assert "secret" not in line
    assert "'my runs'" in command_line("runs", place=place)
