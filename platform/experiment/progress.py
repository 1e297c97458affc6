"""What a person sees while an experiment runs: a live table in a terminal, a line per event elsewhere."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from segadapt.platform.settings.states import TrialState
from segadapt.platform.settings.text import number_text, rough_text, span_text

_SHOWN_TRIALS = 12

_SHOWN_AT_WORK = 4
"""Most trials that a sign of life names."""

_SILENCE_S = 60.0
"""Seconds without a line after which one says that work goes on, where there is no live table."""

_LEAST_REPORTS = 3
"""Fewest reports from whose times the time left is judged."""


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; wide enough for a table where there is none."""
    # Without markup: names of classes and folders may hold `[red]` or `:car:`, which are to be shown as they are.
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    screen = Console(**plain)
    return screen if screen.is_terminal else Console(**plain, width=160)


@dataclass
class TrialView:
    """The last that was heard of a trial."""

    name: str
    state: TrialState = TrialState.STARTING
    step: int = 0
    value: float | None = None
    best: float | None = None
    heard_s: float = 0.0
    """When it began or last reported, by the clock of the progress."""


class _Paces:
    """Mean and spread of the seconds per step between two reports of a trial, kept as sums (Welford)."""

    def __init__(self) -> None:
        self.count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, pace: float) -> None:
        self.count += 1
        difference = pace - self._mean
        self._mean += difference / self.count
        self._squares += difference * (pace - self._mean)

    @property
    def doubt(self) -> float:
        """Two standard errors of the mean, as a share of it."""
        if self.count < 2 or self._mean <= 0:
            return math.inf
        return 2 * math.sqrt(self._squares / (self.count - 1) / self.count) / self._mean


@dataclass
class Progress:
    """Collects events of an experiment and shows them.

    Args:
        title: What runs; None shows nothing.
        objective: The metric shown.
        trials: Trials asked for.
        steps: Steps of a full trial.
        console: Where it is shown.
        clock: Returns seconds.
    """

    title: str | None
    objective: str
    trials: int
    steps: int
    console: Console = field(default_factory=console)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._views: dict[str, TrialView] = {}
        self._started = self._said = self.clock()
        self._paces = _Paces()
        self._full_trials = 0.0  # that ended in this session, each counted as the share of its steps that it did
        self._ended_here = 0
        self._taken = 0  # steps of this session; sums are kept, since there may be many trials
        self._missing = self.trials * self.steps
        self._ended = 0
        self._best: TrialView | None = None
        self._live: Live | None = None
        if self.title is not None and self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._live.start()
        self._print(f"{self.title}: {self._count()}, {self.steps} steps each")

    def ended_before(self, trials: int) -> None:
        """Count trials that ended in earlier sessions."""
        self._ended += trials
        self._missing -= trials * self.steps
        self._print(f"{self.title}: going on, {self._count()}")

    def reached_before(self, name: str, value: float) -> None:
        """Take a value of earlier sessions into account."""
        if self._best is None or self._best.best is None or value > self._best.best:
            self._best = TrialView(name, best=value)

    def beat(self) -> None:
        """Say what is at work, if nothing was said for long."""
        if self.clock() - self._said < _SILENCE_S:
            return
        at_work = [view for view in self._views.values() if view.state.is_active]
        shown = [f"{view.name} step {view.step}/{self.steps}" for view in at_work[:_SHOWN_AT_WORK]]
        shown += [f"{len(at_work) - _SHOWN_AT_WORK} more"] * (len(at_work) > _SHOWN_AT_WORK)
        self._say(f"at work: {', '.join(shown)}" if shown else "waiting for a trial to begin")

    def started(self, key: str, name: str, step: int = 0) -> None:
        """Show a trial that was handed to a process, for the first time or again; `step` steps were done earlier."""
        if key not in self._views:
            self._views[key] = TrialView(name, step=step)
            self._missing -= step
        self._views[key].heard_s = self.clock()

    def result(self, key: str, step: int, value: float | None) -> None:
        """Show the evaluation of a trial."""
        view = self._views[key]
        self._taken += step - view.step
        if step > view.step:
            self._paces.add((self.clock() - view.heard_s) / (step - view.step))
        view.heard_s = self.clock()
        self._change(view, TrialState.RUNNING, step)
        view.value = value
        if value is not None and (view.best is None or value > view.best):
            view.best = value
            if self._best is None or self._best.best is None or value > self._best.best:
                self._best = view
        self._say(f"{view.name} step {step}/{self.steps} {self.objective} {number_text(value)}")

    def paused(self, key: str) -> None:
        """Show that a trial waits at a rung."""
        self._change(self._views[key], TrialState.PAUSED)
        self._say(f"{self._views[key].name} paused")

    def ended(self, key: str, state: TrialState) -> None:
        """Show that a trial ended; `state` says how."""
        view = self._views[key]
        self._change(view, state)
        self._ended_here += 1
        self._full_trials += view.step / max(1, self.steps)
        self._say(f"{view.name} {state}")

    def close(self) -> None:
        """Leave the last picture standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _change(self, view: TrialView, state: TrialState, step: int | None = None) -> None:
        """Give a trial its state and step, and account for them."""
        self._account(view, -1)
        view.state, view.step = state, view.step if step is None else step
        self._account(view, 1)

    def _account(self, view: TrialView, times: int) -> None:
        if view.state.is_active:
            self._missing += times * (self.steps - view.step)
        elif view.state is not TrialState.PAUSED:
            self._ended += times

    def _say(self, event: str) -> None:
        best = self._best
        best_so_far = f"best {number_text(best.best)} ({best.name})" if best else "no result yet"
        self._print(" · ".join([event, best_so_far, self._count(), *self._time_left()]))

    def _print(self, line: str) -> None:
        """Write a line where there is no live table."""
        if self._live is None and self.title is not None:
            self.console.print(line)
            self._said = self.clock()

    def _count(self) -> str:
        return f"{self._ended}/{self.trials} trials done"

    def _time_left(self) -> list[str]:
        """Judge the time left from this session's steps per second, once there are reports enough.

        At most all missing trials take all of their steps, at least they are stopped as early as those that have ended.
        Either is as sure as the times of steps were alike.
        """
        if self._paces.count < _LEAST_REPORTS or self._missing <= 0:
            return []
        seconds = (self.clock() - self._started) / self._taken * self._missing
        doubt = self._paces.doubt
        most = seconds * (1 + doubt)
        if self.trials > 1 and self._ended_here == 0:
            return [f"at most {rough_text(most)} left"]
        share = self._full_trials / self._ended_here if self._ended_here else 1.0
        return [f"{span_text(seconds * min(1.0, share) * max(0.0, 1 - doubt), most)} left"]

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "step", self.objective, "best"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for view in list(self._views.values())[-_SHOWN_TRIALS:]:
            step = f"{view.step}/{self.steps}"
            table.add_row(view.name, view.state, step, number_text(view.value), number_text(view.best))
        best = self._best
        line = " · ".join([self._count(), *self._time_left()])
        if best is not None:
            line += f" · best {self.objective} {number_text(best.best)} ({best.name})"
        total = self.trials * self.steps
        bar = ProgressBar(total=max(1, total), completed=total - self._missing, width=60)
        return Group(Text(self.title or "", style="bold"), table, bar, Text(line))
