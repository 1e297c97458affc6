"""What a person sees while an experiment runs: a live table in a terminal, a line per event elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from segadapt.platform.settings.states import TrialState
from segadapt.platform.settings.text import number_text

_SHOWN_TRIALS = 12


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


@dataclass
class Progress:
    """Collects events of an experiment and shows them.

    Args:
        title: What runs.
        objective: The metric shown.
        trials: Trials asked for.
        steps: Steps of a full trial.
    """

    title: str
    objective: str
    trials: int
    steps: int
    console: Console = field(default_factory=console)

    def __post_init__(self) -> None:
        self._views: dict[str, TrialView] = {}
        self._started = time.monotonic()
        self._taken = 0  # steps of this session; sums are kept, since there may be many trials
        self._missing = self.trials * self.steps
        self._ended = 0
        self._best: TrialView | None = None
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._live.start()
        else:
            self.console.print(f"{self.title}: {self._count()}, {self.steps} steps each")

    def ended_before(self, trials: int) -> None:
        """Count trials that ended in earlier sessions."""
        self._ended += trials
        self._missing -= trials * self.steps
        if self._live is None:
            self.console.print(f"{self.title}: going on, {self._count()}")

    def started(self, key: str, name: str, step: int = 0) -> None:
        """Show a trial that was handed to a process, for the first time or again; `step` steps were done earlier."""
        if key not in self._views:
            self._views[key] = TrialView(name, step=step)
            self._missing -= step

    def result(self, key: str, step: int, value: float | None) -> None:
        """Show the evaluation of a trial."""
        view = self._views[key]
        self._taken += step - view.step
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
        if self._live is None:
            best = self._best
            best_so_far = f"best {number_text(best.best)} ({best.name})" if best else "no result yet"
            self.console.print(f"{event} · {best_so_far} · {self._count()} · {self._time_left()}")

    def _count(self) -> str:
        return f"{self._ended}/{self.trials} trials done"

    def _time_left(self) -> str:
        """Judge the time left from the steps per second of this session; stopped trials leave no steps to do."""
        if self._taken <= 0:
            return "time left unknown"
        seconds = (time.monotonic() - self._started) / self._taken * self._missing
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "step", self.objective, "best"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for view in list(self._views.values())[-_SHOWN_TRIALS:]:
            step = f"{view.step}/{self.steps}"
            table.add_row(view.name, view.state, step, number_text(view.value), number_text(view.best))
        best = self._best
        line = f"{self._count()} · {self._time_left()}"
        if best is not None:
            line += f" · best {self.objective} {number_text(best.best)} ({best.name})"
        total = self.trials * self.steps
        bar = ProgressBar(total=max(1, total), completed=total - self._missing, width=60)
        return Group(Text(self.title, style="bold"), table, bar, Text(line))
