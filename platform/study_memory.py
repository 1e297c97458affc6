"""The study of a running search: read from memory, written to Optuna's storage by a thread of its own."""

import copy
import threading
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

_GATHER_S = 0.2
"""How long changes are gathered before they are written: a trial that has many at once is written once."""


class StudyMemory(InMemoryStorage):
    """One study in memory, whose every change is soon in a slower storage too.

    A database takes milliseconds for each parameter, value and attribute, and a search waits for each. Here a thread
    writes what changed of a trial in one go, in the order in which trials changed. `flush` waits until all is written:
    before anybody relies on it, such as Ray's own snapshot of the search.

    Ids are this object's, numbers of trials are the study's. What others write to the study meanwhile is not seen.

    Args:
        record: The storage that lasts. One of its studies is taken into memory, the first that is asked for or made.
    """

    def __init__(self, record: BaseStorage) -> None:
        super().__init__()
        self._record = record
        self._record_study: int | None = None
        self._written: dict[int, FrozenTrial] = {}
        self._record_ids: dict[int, int] = {}
        self._changed: dict[int, None] = {}  # in the order of the first change that is not yet written
        self._condition = threading.Condition()
        self._writing = False
        self._hurried = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_changes, name="segadapt-study", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Wait until the record holds every change.

        Raises:
            Exception: What the record raised when it was last written to; the search cannot go on without it.
        """
        with self._condition:
            self._hurried = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._error is not None or not (self._changed or self._writing))
            self._hurried = False
        self._check()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        try:
            self.flush()
        finally:
            with self._condition:
                self._closed = True
                self._condition.notify_all()
            self._thread.join()

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Make a study in the record and take it."""
        self._record.create_new_study(directions, study_name)
        assert study_name is not None
        return self.get_study_id_from_name(study_name)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study, which is taken from the record if it is the first.

        Raises:
            KeyError: If the record has none of this name, or another one was taken.
        """
        if self._record_study is None:
            self._take(study_name, self._record.get_study_id_from_name(study_name))
        return super().get_study_id_from_name(study_name)

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return the studies of the record."""
        return self._record.get_all_studies()

    def delete_study(self, study_id: int) -> None:
        """Refuse: delete the study in the record."""
        raise ValueError("StudyMemory must keep its study, but was asked to delete it. Delete it in the record.")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute here and, at once, in the record."""
        super().set_study_user_attr(study_id, key, value)
        self._record.set_study_user_attr(self._taken, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute here and, at once, in the record."""
        super().set_study_system_attr(study_id, key, value)
        self._record.set_study_system_attr(self._taken, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial; the record gets it with all that is known of it by then."""
        trial_id = super().create_new_trial(study_id, template_trial)
        self._note(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Set a parameter."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._note(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set the state and the final values."""
        done = super().set_trial_state_values(trial_id, state, values)
        self._note(trial_id)
        return done

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set the value at a step."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute."""
        super().set_trial_user_attr(trial_id, key, value)
        self._note(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's."""
        super().set_trial_system_attr(trial_id, key, value)
        self._note(trial_id)

    @property
    def _taken(self) -> int:
        assert self._record_study is not None
        return self._record_study

    def _take(self, study_name: str, record_study: int) -> None:
        """Copy a study of the record into memory."""
        self._record_study = record_study
        study = super().create_new_study(self._record.get_study_directions(record_study), study_name)
        for name, value in self._record.get_study_user_attrs(record_study).items():
            super().set_study_user_attr(study, name, value)
        for name, value in self._record.get_study_system_attrs(record_study).items():
            super().set_study_system_attr(study, name, value)
        for trial in self._record.get_all_trials(record_study, deepcopy=False):
            trial_id = super().create_new_trial(study, trial)
            self._written[trial_id] = self._snapshot(trial_id)
            self._record_ids[trial_id] = trial._trial_id

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _note(self, trial_id: int) -> None:
        self._check()
        with self._condition:
            self._changed[trial_id] = None
            self._condition.notify_all()

    def _write_changes(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._changed or self._closed)
                self._condition.wait_for(lambda: self._hurried or self._closed, _GATHER_S)
                if not self._changed:
                    return
                changed, self._changed = self._changed, {}
                self._writing = True
            try:
                for trial_id in changed:
                    self._write(trial_id, self._snapshot(trial_id))
            except BaseException as error:  # raised where the search meets it next
                self._error = error
            with self._condition:
                self._writing = False
                self._condition.notify_all()
            if self._error is not None:
                return

    def _snapshot(self, trial_id: int) -> FrozenTrial:
        """Return a trial as it is now. Storage replaces what changes, but Optuna's `Trial` writes into what it read."""
        trial = copy.copy(self._get_trial(trial_id))
        trial.params = dict(trial.params)
        trial.distributions = dict(trial.distributions)
        trial.user_attrs = dict(trial.user_attrs)
        trial.system_attrs = dict(trial.system_attrs)
        trial.intermediate_values = dict(trial.intermediate_values)
        return trial

    def _write(self, trial_id: int, trial: FrozenTrial) -> None:
        """Bring the record of a trial up to `trial`."""
        written = self._written.get(trial_id)
        if written is None:
            self._record_ids[trial_id] = self._record.create_new_trial(self._taken, trial)
        else:
            self._write_difference(self._record_ids[trial_id], written, trial)
        self._written[trial_id] = trial

    def _write_difference(self, record_id: int, written: FrozenTrial, trial: FrozenTrial) -> None:
        """Write parameters before values before decisions (attributes) before the state, which closes the trial."""
        record = self._record
        if written.state == TrialState.WAITING != trial.state:
            record.set_trial_state_values(record_id, TrialState.RUNNING)
        for name, distribution in trial.distributions.items():
            if name not in written.distributions:
                value = distribution.to_internal_repr(trial.params[name])
                record.set_trial_param(record_id, name, value, distribution)
        for step, value in trial.intermediate_values.items():
            if step not in written.intermediate_values or written.intermediate_values[step] != value:
                record.set_trial_intermediate_value(record_id, step, value)
        for name, attribute in trial.system_attrs.items():
            if name not in written.system_attrs or written.system_attrs[name] != attribute:
                record.set_trial_system_attr(record_id, name, attribute)
        for name, attribute in trial.user_attrs.items():
            if name not in written.user_attrs or written.user_attrs[name] != attribute:
                record.set_trial_user_attr(record_id, name, attribute)
        if trial.state.is_finished() and not written.state.is_finished():
            record.set_trial_state_values(record_id, trial.state, trial.values)
