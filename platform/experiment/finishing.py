"""Finishing a trial: final self-training from its checkpoint."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.planning import check_labels
from segadapt.platform.experiment.record import RECORD, Candidate, Options, Outcome, Record
from segadapt.platform.experiment.session import run
from segadapt.platform.results.leaderboard import Row, leaderboard, open_client, pick_run, run_tags, runs_of
from segadapt.platform.settings.config import TrialConfig, Values, anchored, flatten, keys, resolve
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.checkpoints import (
    checkpoint_folder,
    checkpoint_name,
    checkpoints,
    configuration,
    read_metrics,
)
from segadapt.platform.storage.driving import driving
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.metric_names import true_names
from segadapt.platform.tracking.tags import CHECKPOINT_TAG, EXPERIMENT_TAG, KEY_TAG, SEED_TAG, STATE_TAG, TRIAL_ID_TAG
from segadapt.platform.trial.checking import checked_config
from segadapt.trainables import method_class
from segadapt.trainables.core.networks import NetworkConfig
from segadapt.trainables.self_training import SelfTraining

_INHERITED = ("data.", "network.", "augmentation.", "trainer.batch_size", "trainer.accumulate", "trainer.precision")
"""Settings that a finish takes over from its trial; the others act on the adaptation alone."""


@dataclass(frozen=True)
class FinishResult:
    """A model before and after self-training."""

    name: str
    from_run: str
    seed: int
    best: float | None
    """Leading goal of the search at the best checkpoint."""
    before: Mapping[str, float]
    """Metrics of the trial's network, between 0 and 1."""
    after: Mapping[str, float]
    """Metrics after the last step, between 0 and 1."""
    rounds: Sequence[Mapping[str, float]]
    """What each round that ended gave: `labelled_share`, of the target's pixels, and metrics at its end."""
    checkpoint: str | None
    """Folder of the best checkpoint by the search's objective."""
    last: str | None
    """Folder of the checkpoint of the last step."""


@dataclass(frozen=True)
class FinishRequest:
    """What is asked of a finish."""

    run: str
    """Name of a run in the search, or `best`."""
    search: str
    """The search (or single run) that holds the trial."""
    settings: Values
    """Settings of the method `self_training` that differ from its defaults, by dotted key."""
    rounds: int | None = None
    """Times the target is labelled; None leaves `method.rounds` as it is."""
    seeds: int = 1
    """Seeds on which it is done, counted from the trial's, or the one given."""
    keep_losses: bool = False
    """Whether the losses of the trial's method stay, with its state, beside those on pseudo labels."""


def finish_run(request: FinishRequest, options: Options) -> tuple[list[FinishResult], Outcome]:
    """Self-train from the kept checkpoint of a trial; return one result per seed that began, and how it ended.

    Raises:
        UsageError: If there is no such trial, it left no checkpoint, or its losses cannot be kept.
    """
    record, row = plan_finish(request, options.place)
    with driving(options.place.prepared(), record.name):
        outcome = run(record, options)
    return _finish_results(record, row, options), outcome


def plan_finish(request: FinishRequest, place: Place) -> tuple[Record, Row]:
    """Check what is asked of a finish and return what it would do, with the trial that it continues.

    Raises:
        UsageError: If there is no such trial, it left no checkpoint, or its losses cannot be kept.
    """
    if request.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, but got {request.seeds}.")
    if request.rounds is not None and "method.rounds" in request.settings:
        raise UsageError(
            f"--rounds sets method.rounds, but got --rounds {request.rounds} and "
            f"method.rounds={request.settings['method.rounds']}. Keep one."
        )
    board = leaderboard(request.search, place)
    row = pick_run(board, request.run)
    assert row.checkpoint is not None
    start = Path(row.checkpoint)
    try:
        trained = dict(flatten(configuration(start)))
    except OSError as error:
        raise UsageError(
            f"The checkpoint of {row.name} must lie in {start}, but cannot be read: {error.strerror}. "
            "Name the --storage of the search, or finish another run, or run the trial again."
        ) from error
    values = request.settings if request.rounds is None else {**request.settings, "method.rounds": request.rounds}
    settings = finish_settings(row.method, trained, anchored(values), keep_losses=request.keep_losses)
    check_tuning(checked_config("self_training", settings, place.folders), trained, request.seeds)
    noted = checkpoint_name(place.folders, start)
    name = _finish_name(request, row, settings, noted)
    former_name = _finish_name(request, row, settings, row.checkpoint)  # an earlier version may have begun it
    record = Record(
        kind="finish",
        name=former_name if (place.folders.experiment(former_name) / RECORD).is_file() else name,
        candidates={"self_training": Candidate(settings)},
        objective=board.objective,
        trials=request.seeds,
        seeds=request.seeds,
        search=request.search,
        start=noted,
        from_key=run_tags(row, place)[KEY_TAG],
        from_name=row.name,
    )
    check_labels(record)
    return record, row


def check_tuning(config: TrialConfig, trained: Values, seeds: int) -> None:
    """Make sure that a finish trains the parts of the network that its trial did, beside the same frozen backbone.

    Args:
        config: Of the finish.
        trained: All settings of the trial, by dotted key.
        seeds: Number of seeds on which it is done.

    Raises:
        UsageError: If the trial's checkpoint does not fit.
    """
    network = config.network
    for name in ("tune", "lora_rank", "lora_targets"):
        before, after = trained.get(f"network.{name}", getattr(NetworkConfig, name)), getattr(network, name)
        if (tuple(before) if isinstance(before, list) else before) != after:
            raise UsageError(
                f"network.{name} of a finish must be that of its trial, {before!r}, but is {after!r}. Leave it out."
            )
    drawn = network.tune != "full" and network.weights in (None, "none")
    if drawn and (seeds > 1 or config.seed != trained["seed"]):
        raise UsageError(
            f"A finish must have its trial's seed, {trained['seed']}, alone where network.tune={network.tune} and the "
            f"frozen backbone is random, but got seed {config.seed} and --seeds {seeds}. Leave them out."
        )


def _finish_name(request: FinishRequest, row: Row, settings: Values, start: str) -> str:
    """Return the name of the folder of a finish: the same for the same checkpoint, settings and seeds."""
    asked = [start, settings, *([request.seeds] if request.seeds > 1 else [])]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return f"{request.search}.finish-{row.name}-{digest}"


def finish_settings(method: str, trained: Values, values: Values, *, keep_losses: bool = False) -> dict[str, Any]:
    """Return the settings of `self_training` that finish a trial.

    Args:
        method: Method of the trial.
        trained: All settings of the trial, by dotted key.
        values: Settings of the finish that are given; they win.
        keep_losses: Whether the losses of the trial's method stay, with its state.
    """
    settings = {key: value for key, value in trained.items() if key.startswith(_INHERITED)}
    if (rule := method_class(method).aligns_corners) is not None:
        settings["network.align_corners"] = rule
    if keep_losses:
        losses = dataclasses.asdict(_resolved(method, trained).method)
        settings |= {"method.kept_method": method, **{f"method.kept_settings.{key}": losses[key] for key in losses}}
        if trained.get("online.enabled"):
            settings |= {key: value for key, value in trained.items() if key.startswith("online.")}
    elif method_class(method).splits_stem(_resolved(method, trained).method):
        settings["method.split_stem"] = True
    settings |= {"seed": trained["seed"], **values}
    if "method.rule" not in settings:
        settings = {**_labelling(method, trained), **settings}
    restart = _restarts(resolve("self_training", settings))
    settings.setdefault("trainer.evaluate_start", not restart)  # the trial's network is not what is trained then
    return settings


def _labelling(method: str, trained: Values) -> dict[str, Any]:
    """Return the settings of `self_training` that label as the trial's method does, with the trial's own settings."""
    rule = method_class(method).labelling(_resolved(method, trained).method)
    return {f"method.{key}": value for key, value in rule.items()}


def _resolved(method: str, trained: Values) -> TrialConfig:
    """Return the configuration of a trial from what its checkpoint says."""
    return resolve(method, {key: value for key, value in trained.items() if key in keys(method)})


def _restarts(config: TrialConfig) -> bool:
    """Return whether a finish gives the network its first weights again."""
    assert isinstance(config.method, SelfTraining.Config)
    return config.method.restart


def _finish_results(record: Record, row: Row, options: Options) -> list[FinishResult]:
    """Return how the runs of a finish ended, best first."""
    client = open_client(options.place)
    runs = [run for run in runs_of(client, str(record.search)) if run.data.tags.get(EXPERIMENT_TAG) == record.name]
    known = [run for run in runs if run.data.tags.get(STATE_TAG) != str(TrialState.LOST)]  # a kill may have left others
    newest = {run.info.run_name: run for run in reversed(known)}
    results = [_finish_result(record, row, run, client, options) for run in newest.values()]
    return sorted(results, key=lambda result: (math.inf if result.best is None else -result.best, result.seed))


def _finish_result(record: Record, row: Row, run: Any, client: Any, options: Options) -> FinishResult:
    before, after = {}, {}
    for stored, name in true_names(run.data.metrics, run.data.tags).items():
        if name.startswith(("target_val/", "source_val/", "score/")):
            history = sorted(client.get_metric_history(run.info.run_id, stored), key=lambda entry: entry.step)
            before[name], after[name] = history[0].value, history[-1].value
    if _restarts(next(iter(record.configs.values()))):  # what was evaluated first is not the trial's network
        shown = read_metrics(checkpoint_folder(options.place.folders, str(record.start)))
        before = {name: shown.get(name, math.nan) for name in after}
    metrics, tags = run.data.metrics, run.data.tags
    ended = itertools.takewhile(lambda number: f"round/{number}/labelled_share" in metrics, itertools.count(1))
    rounds = [
        {name.removeprefix(f"round/{number}/"): v for name, v in metrics.items() if name.startswith(f"round/{number}/")}
        for number in ended
    ]
    storage, noted = options.place.folders, tags.get(CHECKPOINT_TAG)
    kept = list(checkpoints(storage.experiment(record.name), tags[TRIAL_ID_TAG]))
    last = max(kept, key=lambda entry: entry.metrics["step"], default=None)
    return FinishResult(
        name=run.info.run_name,
        from_run=row.name,
        seed=int(tags[SEED_TAG]),
        best=metrics.get(f"best/{Objective.parse(record.objective).leading}"),
        before=before,
        after=after,
        rounds=rounds,
        checkpoint=str(checkpoint_folder(storage, noted)) if noted is not None else None,
        last=str(last.path) if last is not None else None,
    )
