"""The operations of records on an MLflow server."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segadapt.platform.settings.states import MlflowStatus, TrialState
from segadapt.platform.storage.checkpoints import class_names, confusion, iou_table, label_table
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.metric_names import stored_name, true_name_tags
from segadapt.platform.tracking.outbox import Entry
from segadapt.platform.tracking.pictures import gallery_pictures, gallery_stem
from segadapt.platform.tracking.tags import CHECKPOINT_TAG, KEY_TAG, PARENT_TAG, STATE_TAG
from segadapt.trainables.core.training.checkpoint import GALLERY

logger = logging.getLogger(__name__)

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow open an experiment with its table of runs; it would show traces of language models otherwise."""

_TABLE = "per_class_iou.json"

_LABEL_TABLE = "pseudo_labels.json"


class LostRunError(Exception):
    """The server does not have the run of a record, though one was started."""


class RunWriter:
    """The operations of records, on an MLflow server. Each may be repeated right away, as after a kill.

    A run is found by its key before it is made. Metrics are rows by run, name, step, time and value, and the time is
    the record's. Tags, the end of a run and artifacts overwrite themselves. What was found out of a run is remembered
    for as long as the server knows the run.
    """

    def __init__(self, client: Any, artifacts: Path | None) -> None:
        self._client = client
        self._artifacts = artifacts
        self._entry: Entry | None = None
        self._parts: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._run_ids: dict[str, str] = {}
        self._steps: dict[str, set[int]] = {}
        self._galleries: dict[str, set[str]] = {}

    def perform(self, entry: Entry) -> None:
        """Do what a record says; parts that an earlier try of it did are not done again.

        Raises:
            LostRunError: If the server does not have its run.
            Exception: Whatever MLflow's client raises if the server does not do it.
        """
        from mlflow.exceptions import MlflowException

        if entry is not self._entry:
            self._entry, self._parts = entry, set()
        try:
            self._perform(entry.operation, entry.arguments, entry.files)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self._forget()
                raise LostRunError(str(error)) from error
            if not self._restored_with_its_experiment(entry.arguments.get("key", "")):
                raise
            self._perform(entry.operation, entry.arguments, entry.files)

    def _perform(self, operation: str, arguments: Mapping[str, Any], files: Path | None) -> None:
        getattr(self, f"_{operation}")(**arguments, **({} if files is None else {"files": files}))

    def _part(self, name: str, request: Callable[..., object], *words: Any) -> None:
        """Do a part of a record, unless an earlier try of the record did."""
        if name not in self._parts:
            request(*words)
            self._parts.add(name)

    def check(self) -> None:
        """Make a small request.

        Raises:
            Exception: Whatever MLflow's client raises if the server does not answer it.
        """
        self._client.search_experiments(max_results=1)

    def answers(self) -> bool:
        """Return whether the server takes a request."""
        for _ in range(2):  # the first may meet the connection that the failure left behind
            with contextlib.suppress(Exception):
                self.check()
                return True
        return False

    def _start(
        self,
        *,
        key: str,
        experiment: str,
        name: str,
        tags: dict[str, str],
        params: Mapping[str, str],
        parent_key: str | None,
        timestamp: int,
    ) -> None:
        experiment_id = self._experiment_id(experiment)
        run = self._find([experiment_id], key)
        all_tags = {**tags, **self._parent_tag(parent_key), **true_name_tags(params)}
        if run is not None:
            self._run_ids[key] = run.info.run_id
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._set_tags(key=key, tags=all_tags)
        else:
            made = self._client.create_run(experiment_id, timestamp, {KEY_TAG: key, **all_tags}, name)
            self._run_ids[key] = made.info.run_id
        self._log_missing_params(key, params, {} if run is None else run.data.params)

    def _log_missing_params(self, key: str, params: Mapping[str, str], present: Collection[str]) -> None:
        from mlflow.entities import Param

        stored = {stored_name(name): value for name, value in params.items()}
        if new := [Param(name, value) for name, value in stored.items() if name not in present]:
            self._client.log_batch(self._run_ids[key], params=new)

    def _parent_tag(self, parent_key: str | None) -> dict[str, str]:
        """Return the tag by which a run is shown under another one, which the server has."""
        if parent_key is None:
            return {}
        run_id = self._run_id(parent_key)
        self._client.get_run(run_id)  # a remembered one may be gone
        return {PARENT_TAG: run_id}

    def _again(self, *, operation: str, arguments: Mapping[str, Any], files: Path | None = None) -> None:
        """Do what a record says that was refused before. What came after it counts: only what is missing is added."""
        if operation == "end_lost":  # whoever came later has looked
            return
        key = arguments["key"]
        if operation == "start":
            run = self._find([self._experiment_id(arguments["experiment"])], key)
            if run is None:
                self._start(**arguments)
                return
            self._run_ids[key] = run.info.run_id
            params = arguments["params"]
            tags = {**arguments["tags"], **self._parent_tag(arguments["parent_key"]), **true_name_tags(params)}
            self._set_missing_tags(run, tags)
            self._log_missing_params(key, params, run.data.params)
            return
        run = self._client.get_run(self._run_id(key))
        if operation == "set_tags" or (operation == "end" and run.info.status != "RUNNING"):
            self._set_missing_tags(run, arguments.get("tags") or {})
        elif not self._has_artifact(run.info.run_id, artifact_of(operation, arguments)):
            self._perform(operation, arguments, files)

    def _set_missing_tags(self, run: Any, tags: Mapping[str, str]) -> None:
        if missing := {name: value for name, value in tags.items() if name not in run.data.tags}:
            self._set_tags(key=run.data.tags[KEY_TAG], tags=missing)

    def _has_artifact(self, run_id: str, path: str | None) -> bool:
        if path is None:
            return False
        folder = path.rpartition("/")[0] or None
        return any(entry.path == path for entry in self._client.list_artifacts(run_id, folder))

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            location = (self._artifacts / name).as_uri() if self._artifacts else None
            try:
                return str(self._client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS))
            except MlflowException:
                experiment = self._client.get_experiment_by_name(name)  # another process may have been first
                if experiment is None:
                    raise
        self._restore_if_deleted(experiment)
        return str(experiment.experiment_id)

    def _restore_if_deleted(self, experiment: Any) -> bool:
        """Restore an experiment, with its runs, that was deleted in MLflow's page: a command goes on with it."""
        if experiment.lifecycle_stage == "active":
            return False
        self._client.restore_experiment(experiment.experiment_id)
        logger.warning("The experiment %s was deleted in MLflow; it is restored, since it goes on.", experiment.name)
        return True

    def _restored_with_its_experiment(self, key: str) -> bool:
        """Return whether a run was deleted with its experiment, which is restored then."""
        if key not in self._run_ids:
            return False
        run = self._client.get_run(self._run_ids[key])
        return run.info.lifecycle_stage != "active" and self._restore_if_deleted(
            self._client.get_experiment(run.info.experiment_id)
        )

    def _find(self, experiments: list[str], key: str) -> Any:
        """Return the run of a key; of several, that which knows most."""
        runs = runs_by_key(self._client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'"))
        return runs[key][0] if runs else None

    def has(self, key: str) -> bool:
        """Return whether the server has a run of a key."""
        try:
            self._run_id(key)
        except LostRunError:
            return False
        return True

    def _run_id(self, key: str) -> str:
        """Return the id of a run of this session or, by its key, of an earlier one."""
        if key not in self._run_ids:
            experiments = [entry.experiment_id for entry in pages(self._client.search_experiments)]
            run = self._find(experiments, key) or self._restored(key)
            if run is None:
                raise LostRunError(f"A run must be started before its records, but MLflow has none of {key!r}.")
            self._run_ids[key] = run.info.run_id
        return self._run_ids[key]

    def _restored(self, key: str) -> Any:
        """Return the run of a key that was deleted with its experiment, which is restored; None if there is none.

        Raises:
            ValueError: If that run alone was deleted, as nobody does by accident.
        """
        from mlflow.entities import ViewType

        experiments = {entry.experiment_id: entry for entry in pages(self._client.search_experiments, ViewType.ALL)}
        filter_string = f"tags.`{KEY_TAG}` = '{key}'"
        deleted = self._client.search_runs(list(experiments), filter_string, ViewType.DELETED_ONLY)
        if not deleted:
            return None
        experiment = experiments[deleted[0].info.experiment_id]
        if not self._restore_if_deleted(experiment):
            raise ValueError(f"The run {key!r} must be there, but was deleted in MLflow. Restore it there.")
        return self._find([experiment.experiment_id], key)

    def _log_metrics(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id(key), "time/evaluation")
            self._steps[key] = {entry.step for entry in history}
        if step not in self._steps[key]:
            self._log_numbers(key, numbers, step, timestamp)
            self._steps[key].add(step)

    def _log_summary(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        run_id = self._run_id(key)
        present = self._client.get_run(run_id).data.metrics

        def is_there(name: str, value: float) -> bool:
            return present.get(stored_name(name)) == value and any(
                (entry.step, entry.value) == (step, value)
                for entry in self._client.get_metric_history(run_id, stored_name(name))
            )

        new = {name: value for name, value in numbers.items() if not is_there(name, value)}
        if new:  # a resumed search sums up once more what it had summed up
            self._log_numbers(key, new, step, timestamp)

    def _log_numbers(self, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(stored_name(name), value, timestamp, step) for name, value in numbers.items()]
        tags = [RunTag(name, value) for name, value in true_name_tags(numbers).items()]
        self._client.log_batch(self._run_id(key), metrics=metrics, tags=tags)

    def _set_tags(self, *, key: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run_id(key), tags=[RunTag(name, value) for name, value in tags.items()])

    def _log_datasets(self, *, key: str, datasets: Sequence[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for dataset in datasets:
            about = {name: value for name, value in dataset.items() if name != "context"}
            inputs.append(DatasetInput(Dataset(**about), [InputTag("mlflow.data.context", dataset["context"])]))
        self._client.log_inputs(self._run_id(key), inputs)

    def _log_gallery(self, *, key: str, step: int, timestamp: int, files: Path) -> None:
        run_id = self._run_id(key)
        if key not in self._galleries:
            self._galleries[key] = {Path(entry.path).name for entry in self._client.list_artifacts(run_id, "images")}
        stem = gallery_stem(self._galleries[key], step, timestamp)
        with tempfile.TemporaryDirectory(prefix="segadapt-") as folder:
            for path in gallery_pictures(files / GALLERY, Path(folder), stem):
                if path.name not in self._galleries[key]:
                    self._client.log_artifact(run_id, str(path), "images")
                    self._galleries[key].add(path.name)
        self._part("tag", self._client.set_tag, run_id, "mlflow.loggedImages", "True")

    def _log_json(self, *, key: str, content: Any, name: str) -> None:
        self._client.log_dict(self._run_id(key), content, name)

    def _log_file(self, *, key: str, path: str, folder: str | None, files: Path) -> None:
        kept = files / Path(path).name
        if kept.is_dir():
            for file in sorted(below for below in kept.rglob("*") if below.is_file()):
                place = "/".join([*([folder] if folder else []), *file.relative_to(kept).parts[:-1]])
                self._part(str(file), self._client.log_artifact, self._run_id(key), str(file), place or None)
        elif kept.exists():
            self._client.log_artifact(self._run_id(key), str(kept), folder)
        else:
            raise FileNotFoundError(f"A file to track must exist, but {path} did not.")

    def _log_evaluation(self, *, key: str, files: Path) -> None:
        from segadapt.platform.tracking.pictures import confusion_picture

        run_id = self._run_id(key)
        for domain in ("target_val", "source_val"):
            counts = confusion(files, domain)
            if not any(map(any, counts)):
                continue  # a target without labels has nothing to confuse
            if (name := f"confusion/{domain}.png") not in self._parts:
                picture = confusion_picture(counts, class_names(files), domain)
                self._part(name, self._client.log_image, run_id, picture, name)
        # `log_table` would add to the table of an earlier session
        tables = {_TABLE: iou_table(files), _LABEL_TABLE: label_table(files)}
        shown = {name: table for name, table in tables.items() if table is not None}
        for name, table in shown.items():
            self._part(name, self._client.log_dict, run_id, table, name)
        logged = [{"path": name, "type": "table"} for name in shown]
        self._part("tag", self._client.set_tag, run_id, "mlflow.loggedArtifacts", json.dumps(logged))
        self._part(GALLERY, self._client.log_artifact, run_id, str(files / GALLERY))

    def _end(self, *, key: str, status: MlflowStatus, timestamp: int, tags: Mapping[str, str] | None = None) -> None:
        if tags:  # records that an earlier version left have none
            self._set_tags(key=key, tags=tags)
        self._client.set_terminated(self._run_id(key), status, timestamp)

    def _end_lost(self, *, experiment: str, prefix: str, known: Collection[str]) -> None:
        in_mlflow = self._client.get_experiment_by_name(experiment)
        if in_mlflow is None:
            return
        for unfinished in ("attributes.status = 'RUNNING'", f"tags.`{STATE_TAG}` = '{TrialState.INTERRUPTED}'"):
            for run in self._client.search_runs([in_mlflow.experiment_id], unfinished, max_results=10_000):
                key = run.data.tags.get(KEY_TAG, "")
                if key.startswith(prefix) and key not in known:
                    self._client.set_tag(run.info.run_id, STATE_TAG, str(TrialState.LOST))
                    if run.info.status == "RUNNING":
                        self._client.set_terminated(run.info.run_id, TrialState.LOST.mlflow)


def make_experiment(place: Place, name: str) -> bool:
    """Make an experiment on the MLflow server of a place; returns False if there is one of that name.

    True as well if the server does not answer: then the records of its runs make it.
    """
    from mlflow.exceptions import MlflowException

    try:
        mlflow_client(place.tracking_url).create_experiment(name, tags=_EXPERIMENT_TAGS)
    except MlflowException as error:
        return bool(error.error_code != "RESOURCE_ALREADY_EXISTS")
    return True


def pages(search: Callable[..., Any], *words: Any, **options: Any) -> Iterator[Any]:
    """Yield all that a search of MLflow's client finds, which returns a page at a time."""
    token = None
    while token != "":
        page = search(*words, page_token=token, **options)
        yield from page
        token = page.token or ""


def runs_by_key(runs: Iterable[Any]) -> dict[str, list[Any]]:
    """Return runs that nobody deleted by their key; of several with one key, the one that knows most comes first.

    A server that was asked twice to make a run, since its first answer was lost, may have two.
    """
    by_key: dict[str, list[Any]] = {}
    for run in runs:
        if run.info.lifecycle_stage == "active" and KEY_TAG in run.data.tags:
            by_key.setdefault(run.data.tags[KEY_TAG], []).append(run)
    return {key: sorted(of_key, key=_evidence, reverse=True) for key, of_key in by_key.items()}


def _evidence(run: Any) -> tuple[Any, ...]:
    state = TrialState.of(run.data.tags.get(STATE_TAG))
    ended = state is not None and not state.is_open and state.mlflow == run.info.status
    return CHECKPOINT_TAG in run.data.tags, ended, len(run.data.metrics), run.info.start_time


def artifact_of(operation: str, arguments: Mapping[str, Any]) -> str | None:
    """Return the path of the artifact that a record writes last; None if it writes none, or a folder."""
    if operation == "log_json":
        return str(arguments["name"])
    if operation == "log_evaluation":
        return GALLERY
    if operation == "log_file":
        return "/".join([*([arguments["folder"]] if arguments["folder"] else []), Path(arguments["path"]).name])
    return None
