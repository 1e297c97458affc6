"""The operations of records on an MLflow server."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from segadapt.platform.settings.states import MlflowStatus, TrialState
from segadapt.platform.storage.checkpoints import class_names, confusion, iou_table, label_table
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.metric_names import stored_name, true_name_tags
from segadapt.platform.tracking.outbox import Entry
from segadapt.platform.tracking.tags import KEY_TAG, PARENT_TAG, STATE_TAG
from segadapt.trainables.core.training.checkpoint import GALLERY

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow open an experiment with its table of runs; it would show traces of language models otherwise."""

_TABLE = "per_class_iou.json"

_LABEL_TABLE = "pseudo_labels.json"

_GALLERY_STEP = re.compile(r"gallery\+step\+(\d+)\+")
"""What MLflow calls the pictures of a step."""


class RunWriter:
    """The operations of records, on an MLflow server. Each may be repeated right away, as after a kill.

    A run is found by its key before it is made. Metrics are rows by run, name, step, time and value, and the time is
    the record's. Tags, the end of a run and artifacts overwrite themselves.
    """

    def __init__(self, client: Any, artifacts: Path | None) -> None:
        self._client = client
        self._artifacts = artifacts
        self._run_ids: dict[str, str] = {}
        self._steps: dict[str, set[int]] = {}
        self._galleries: dict[str, set[int]] = {}

    def perform(self, entry: Entry) -> None:
        """Do what a record says."""
        files = {} if entry.files is None else {"files": entry.files}
        getattr(self, f"_{entry.operation}")(**entry.arguments, **files)

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
        from mlflow.entities import Param

        experiment_id = self._experiment_id(experiment)
        run = self._find([experiment_id], key)
        parent = {} if parent_key is None else {PARENT_TAG: self._run_id(parent_key)}
        all_tags = {**tags, **parent, **true_name_tags(params)}
        present: Mapping[str, str] = {}
        if run is not None:
            present = run.data.params
            self._run_ids[key] = run.info.run_id
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._set_tags(key=key, tags=all_tags)
        else:
            made = self._client.create_run(experiment_id, timestamp, {KEY_TAG: key, **all_tags}, name)
            self._run_ids[key] = made.info.run_id
        stored = {stored_name(name): value for name, value in params.items()}
        if new := [Param(name, value) for name, value in stored.items() if name not in present]:
            self._client.log_batch(self._run_ids[key], params=new)

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
        return str(experiment.experiment_id)

    def _find(self, experiments: list[str], key: str) -> Any:
        runs = self._client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _run_id(self, key: str) -> str:
        """Return the id of a run of this session or, by its key, of an earlier one."""
        if key not in self._run_ids:
            run = self._find([entry.experiment_id for entry in self._client.search_experiments()], key)
            if run is None:
                raise KeyError(f"A run must be started before its records, but {key!r} was not.")
            self._run_ids[key] = run.info.run_id
        return self._run_ids[key]

    def _log_metrics(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id(key), "time/evaluation")
            self._steps[key] = {entry.step for entry in history}
        if step not in self._steps[key]:
            self._log_summary(key=key, numbers=numbers, step=step, timestamp=timestamp)
            self._steps[key].add(step)

    def _log_summary(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
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
        from PIL import Image

        run_id = self._run_id(key)
        if key not in self._galleries:
            matches = (_GALLERY_STEP.search(entry.path) for entry in self._client.list_artifacts(run_id, "images"))
            self._galleries[key] = {int(match[1]) for match in matches if match}
        if step in self._galleries[key]:  # MLflow names images at random: a repeat would be a second one
            return
        try:
            with Image.open(files / GALLERY) as image:
                self._client.log_image(run_id, image, key="gallery", step=step, timestamp=timestamp, synchronous=True)
        except Exception:
            del self._galleries[key]  # it may be there
            raise
        self._galleries[key].add(step)

    def _log_json(self, *, key: str, content: Any, name: str) -> None:
        self._client.log_dict(self._run_id(key), content, name)

    def _log_file(self, *, key: str, path: str, folder: str | None, files: Path) -> None:
        kept = files / Path(path).name
        if kept.is_dir():
            self._client.log_artifacts(self._run_id(key), str(kept), folder)
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
            picture = confusion_picture(counts, class_names(files), domain)
            self._client.log_image(run_id, picture, f"confusion/{domain}.png")
        # `log_table` would add to the table of an earlier session
        tables = {_TABLE: iou_table(files), _LABEL_TABLE: label_table(files)}
        shown = {name: table for name, table in tables.items() if table is not None}
        for name, table in shown.items():
            self._client.log_dict(run_id, table, name)
        logged = [{"path": name, "type": "table"} for name in shown]
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(logged))
        self._client.log_artifact(run_id, str(files / GALLERY))

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
