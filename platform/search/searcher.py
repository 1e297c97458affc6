"""Tune's Optuna searcher over one method or several, whose memory is the study."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher, SearchGenerator

from segadapt.platform.ray_internals.tune import begin_trials_in
from segadapt.platform.search.priorband import PROPOSAL, PriorBandSampler
from segadapt.platform.search.study import (
    LOST,
    PRIOR,
    TOO_LARGE,
    TRIAL_ID,
    Spaces,
    choice_of,
    is_infeasible,
    propose,
    study_point,
)
from segadapt.platform.search.study_storage import trial_handle
from segadapt.platform.settings.config import METHOD, Values
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.reported import End, Reported
from segadapt.trainables.core.data.sampling import derived_seed

logger = logging.getLogger(__name__)

FLOOR = 0.5
"""Part of an equal share of the trials that every method of a search gets, however badly it begins."""

_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}


def make_study(storage: Any, name: str, objective: Objective) -> bool:
    """Make the study of a search; returns False if there is one of that name.

    Args:
        storage: Optuna's.
        name: Of the search.
        objective: What it maximises or minimises.
    """
    directions = [_DIRECTIONS[mode] for mode in objective.modes]
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it tells of a new study
    try:
        optuna.create_study(study_name=name, storage=storage, directions=directions)
    except optuna.exceptions.DuplicatedStudyError:
        return False
    return True


class StudySearch(Searcher):
    """Search over a conditional space whose whole memory is an Optuna study, in storage that outlives the driver.

    Trials that were stopped early are recorded as pruned: their value is one that fewer steps gave. With several
    methods, the method is a choice of its own and the parameters of each depend on it. Values during a trial are
    recorded by its scheduler (`StudyScheduler`), this class asks and tells.

    Args:
        spaces: What varies, by method.
        first: What is tried first of each method, if the study is new.
        objective: Goals of the study.
        sampler: Makes a sampler from its `seed`: a proposal follows from the search's seed, its number and the study
            alone, so that a resumed search proposes what an undisturbed one would.
        seed: Seed of the search.
        concurrent: Trials at a time; paused ones do not count.
        study_name: Name of the study, which is made in `storage` or continued there.
        storage: Optuna's storage.
    """

    def __init__(
        self,
        *,
        spaces: Spaces,
        first: Mapping[str, Values],
        objective: Objective,
        sampler: Callable[..., BaseSampler],
        seed: int,
        concurrent: int,
        study_name: str,
        storage: Any,
    ) -> None:
        super().__init__()
        self._spaces = spaces
        self._goals = list(objective.goals)
        self._make_sampler = sampler
        self._base_seed = seed
        self._concurrent = concurrent
        self._live: set[str] | None = None
        self._paused: set[str] = set()
        self._handles: dict[str, Trial] = {}
        make_study(storage, study_name, objective)
        self._study: Any = optuna.load_study(study_name=study_name, storage=storage, pruner=NopPruner())
        is_new = not self._study.get_trials(deepcopy=False)
        points = [study_point(spaces, method, first[method]) for method in spaces] if is_new else []
        for point in filter(None, points):
            self._study.enqueue_trial(point)

    @property
    def study(self) -> Any:
        """The Optuna study."""
        return self._study

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the study: its address may hold a password, and a resumed search makes a new searcher."""
        return {**self.__dict__, "_study": None, "_handles": {}}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing that the study does not hold, and no empty file, which would look cut short."""
        Path(checkpoint_path).write_text("null")

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing; the study is the memory."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the searched values of a new trial: its method, if there are several, and settings by dotted key.

        None if as many trials run as may at a time.
        """
        if self._live is None:
            running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            self._live = {trial.user_attrs[TRIAL_ID] for trial in running if TRIAL_ID in trial.user_attrs}
        if len(self._live - self._paused) >= self._concurrent:
            return None
        proposed = self._proposed()
        seed = derived_seed(self._base_seed, len(proposed)) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.sampler = self._make_sampler(seed=seed)
        starved = self._starved([trial.params.get(METHOD) for trial in proposed])
        if starved is not None:
            self._study.enqueue_trial(choice_of(self._spaces, starved))
        trial = self._study.ask()
        trial.set_user_attr(TRIAL_ID, trial_id)
        self._handles[trial_id] = trial
        self._live.add(trial_id)
        values = propose(self._spaces, trial)
        if isinstance(self._study.sampler, PriorBandSampler):
            trial.set_user_attr(PROPOSAL, self._study.sampler.proposal.as_dict())
        return values

    def on_pause(self, trial_id: str) -> None:
        """Let another trial run while this one waits at a rung."""
        self._paused.add(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """Count a trial again that goes on."""
        self._paused.discard(trial_id)

    def _proposed(self) -> list[FrozenTrial]:
        """Return the study's trials that this search proposed so far, each once."""
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return [
            trial
            for trial in trials
            if trial.state != TrialState.WAITING and LOST not in trial.user_attrs and PRIOR not in trial.user_attrs
        ]

    def _starved(self, tried: list[str | None]) -> str | None:
        """Return the method that has the fewest trials, if they are fewer than its floor."""
        if not len(tried) >= len(self._spaces) > 1:  # the published settings come first
            return None
        method = min(self._spaces, key=tried.count)
        return method if tried.count(method) < FLOOR * (len(tried) + 1) / len(self._spaces) else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a trial that can never fit; values are recorded by the scheduler, which Tune asks first."""
        if Reported.from_result(result).end is End.INFEASIBLE:
            for constraint, violation in TOO_LARGE.items():
                self._handle(trial_id).set_constraint(constraint, violation)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended: complete, pruned or failed.

        One that can never fit is pruned there: samplers do not look at failed trials, and would not learn from it.
        """
        is_failed = error and not is_infeasible(self._handle(trial_id))
        state, values = TrialState.FAIL if is_failed else TrialState.PRUNED, None
        is_finished = result is not None and not error and Reported.from_result(result).end is End.FINISHED
        if result is not None and is_finished and all(goal in result for goal in self._goals):
            state, values = TrialState.COMPLETE, [result[goal] for goal in self._goals]
        try:
            self._study.tell(self._handle(trial_id), values, state=state)
        except Exception as refusal:  # of a value that is no number; the end of the search closes the trial
            logger.warning(refusal)
        del self._handles[trial_id]
        self._paused.discard(trial_id)
        if self._live is not None:
            self._live.discard(trial_id)

    def _handle(self, trial_id: str) -> Trial:
        """Return what writes to a trial in the study, which an earlier session may have proposed."""
        if trial_id not in self._handles:
            trials = self._study.get_trials(deepcopy=False)
            proposed = next(trial for trial in trials if trial.user_attrs.get(TRIAL_ID) == trial_id)
            self._handles[trial_id] = trial_handle(self._study, proposed)
        return self._handles[trial_id]


class ListedTrials(Searcher):
    """Propose a list of trials in order.

    Args:
        values: Settings of each trial, by dotted key.
        concurrent: Trials at a time.
    """

    def __init__(self, values: Sequence[Values], concurrent: int) -> None:
        super().__init__()
        self._values = values
        self._concurrent = concurrent
        self._proposed: list[str] = []
        self._ended: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the values of the next trial; None if as many run as may at a time."""
        if len(self._proposed) - len(self._ended) >= self._concurrent:
            return None
        self._proposed.append(trial_id)
        return dict(self._values[len(self._proposed) - 1])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room for another trial."""
        self._ended.add(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Keep how far the list was proposed."""
        Path(checkpoint_path).write_text(json.dumps([self._proposed, sorted(self._ended)]))

    def restore(self, checkpoint_path: str) -> None:
        """Go on in the list where an earlier session was."""
        proposed, ended = json.loads(Path(checkpoint_path).read_text())
        self._proposed, self._ended = proposed, set(ended)


class Proposals(SearchGenerator):
    """Tune's trials from a searcher; a search that goes on may have more of them than it began with.

    Args:
        searcher: Proposes values.
        trials: How many trials to run in all, those of earlier sessions included.
        experiments: Folder of all experiments.
    """

    def __init__(self, searcher: Searcher, trials: int, experiments: Path) -> None:
        super().__init__(searcher)
        self._trials = trials
        self._experiments = experiments

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what an earlier session did, but neither how far it was to go nor where the folder was."""
        begin_trials_in(state["experiment"], self._experiments)
        super().set_state({**state, "total_samples": self._trials, "finished": False})
