"""Segadapt at Python's prompt, as in a notebook: a call leaves nothing behind, and Ctrl-C is not the end."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY
from searching import steps_of, tracked, wait_for

SETTINGS = {**TINY, "trainer.steps": 60}

BEFORE = """
import os, signal

import segadapt


def standing():
    handlers = {f"handler of {number}": signal.getsignal(number) for number in signal.valid_signals()}
    return {**os.environ, **handlers, "current folder": os.getcwd()}


def changed():
    now = standing()
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


before = standing()
"""


class Prompt:
    """Python's prompt in a process group of its own, as under a terminal."""

    def __init__(self, folder: Path) -> None:
        (folder / "before.py").write_text(BEFORE)
        self.said_in = folder / "said.txt"
        self._output = self.said_in.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-i", "-q", "-u", "before.py"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self._turns = 0

    def said(self) -> str:
        return self.said_in.read_text()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.strip() + "\n\n")
        self.process.stdin.flush()

    def ask(self, text: str) -> str:
        """Type a line and return what was said until the prompt came back."""
        before = len(self.said())
        self.type(text)
        return self.rest(before)

    def rest(self, before: int) -> str:
        """Return what was said since `before` once the prompt is back."""
        self._turns += 1
        end = f"turn {self._turns} ended"
        self.type(f"print({end!r})")
        wait_for(lambda: f"{end}\n" in self.said()[before:], end, timeout_s=600)
        return self.said()[before:]

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Prompt]:
    opened = Prompt(tmp_path)
    yield opened
    opened.type("exit()")
    opened.process.wait(timeout=120)


@pytest.mark.slow
def test_a_search_is_interrupted_goes_on_and_leaves_nothing_behind(prompt: Prompt, tmp_path: Path) -> None:
    begin = len(prompt.said())
    prompt.type(f"result = segadapt.search('sdca', {SETTINGS}, trials=1, name='s')")
    wait_for(lambda: "sdca-001 step 4/" in prompt.said(), "the trial to go on", timeout_s=600)
    prompt.interrupt()
    prompt.rest(begin)
    assert "True []" in prompt.ask("print(result.interrupted, changed())"), prompt.said()
    assert "interrupted" in prompt.ask("segadapt.status('s').state")

    resumed = prompt.ask("result = segadapt.search(resume='s')")
    assert re.search(r"sdca-001 step 60/60 target_val/miou 0\.\d+ · best", resumed), "progress is shown, line by line"
    assert "sdca-001 step 2/" not in resumed, "it goes on from its checkpoint"
    assert "False 0 []" in prompt.ask("print(result.interrupted, result.failed, changed())"), prompt.said()
    runs = tracked(tmp_path, "s")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps_of(tmp_path, runs["sdca-001"]) == list(range(2, 61, 2)), "every step once"

    for call in (
        "segadapt.runs('s').rows[0].name",
        "segadapt.report('s').name",
        "segadapt.export('best', 's', out='out').version",
        "segadapt.evaluate('best', 's').images",
        "[finding.text for finding in segadapt.doctor() if finding.level == 'fault']",
        "segadapt.plan('sdca').estimate().problems",
    ):
        assert "Error" not in prompt.ask(call), prompt.said()
        assert "left behind: []" in prompt.ask("print('left behind:', changed())"), f"{call}\n{prompt.said()}"


@pytest.mark.slow
def test_the_prompt_lives_on_when_a_call_is_refused_or_interrupted_at_its_start(prompt: Prompt) -> None:
    refused = prompt.ask("segadapt.search('sdca', seeds=3)")
    assert "UsageError: --seeds must come with --rerank K" in refused
    begin = len(prompt.said())
    prompt.type(f"result = segadapt.train('source_only', {SETTINGS}, name='t')")
    wait_for(lambda: "train t (source_only)" in prompt.said(), "Ray to have started", timeout_s=600)
    prompt.interrupt()
    prompt.rest(begin)
    assert "left behind: []" in prompt.ask("print('left behind:', changed())"), prompt.said()
    ended = prompt.ask("print(segadapt.train(resume='t').failed, changed())")
    assert "0 []" in ended, prompt.said()
