"""What MLflow's pages say about a run in words, and on which data it ran."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segadapt.platform.settings.text import short_text
from segadapt.platform.storage.command_lines import command_line
from segadapt.platform.storage.folders import Place
from segadapt.platform.storage.weights import WeightsOrigin
from segadapt.platform.tracking.tags import LICENCE_TAG, WEIGHTS_HASH_TAG, WEIGHTS_TAG
from segadapt.trainables.core.data.datasets import DataConfig, split_location
from segadapt.trainables.core.training.checkpoint import GALLERY

_DIGEST = 36
"""Characters that MLflow keeps of a dataset's fingerprint."""


def datasets(config: DataConfig, fingerprint: str) -> list[dict[str, str]]:
    """Return the datasets of a run, as `Tracker.log_datasets` takes them.

    Args:
        config: Names them.
        fingerprint: Of the contents of both, shortened here to what MLflow takes.
    """
    kinds = {"source": ("streets", "generated"), "target": ("streets", "generated")}
    if config.source is not None and config.target is not None:
        kinds = {"source": split_location(config.source, ""), "target": split_location(config.target, "")}
    parts = (("source", "training"), ("target", "training"), ("target", "evaluation"))
    return [
        {
            "name": f"{kinds[domain][0]}-{domain}-{'val' if context == 'evaluation' else 'train'}",
            "digest": fingerprint[:_DIGEST],
            "source_type": kinds[domain][0],
            "source": json.dumps({"uri": kinds[domain][1]}),
            "context": context,
        }
        for domain, context in parts
    ]


def weights_tags(origin: WeightsOrigin | None) -> dict[str, str]:
    """Return the tags that say what the network of a run started from; none if it started at random."""
    if origin is None:
        return {}
    stored = {WEIGHTS_HASH_TAG: origin.sha256} if origin.sha256 is not None else {}
    return {WEIGHTS_TAG: origin.source, LICENCE_TAG: origin.licence, **stored}


def origin_of_tags(tags: Mapping[str, str]) -> WeightsOrigin | None:
    """Return what `weights_tags` made the tags of a run of; None if they say nothing of weights."""
    if WEIGHTS_TAG not in tags:
        return None
    return WeightsOrigin(tags[WEIGHTS_TAG], tags[LICENCE_TAG], tags.get(WEIGHTS_HASH_TAG))


@dataclass(frozen=True)
class Reached:
    """What a trial reached."""

    name: str
    goals: Mapping[str, float]
    """Each goal of the search at the checkpoint that it kept."""
    step: int
    settings: Mapping[str, Any]
    """What distinguishes it from the others, by dotted key."""


def search_note(
    name: str,
    best: Reached,
    others: Sequence[Reached],
    trials: int,
    start: Mapping[str, float],
    verdict: str | None,
    place: Place,
) -> str:
    """Return the description of a search that has ended, in Markdown.

    Args:
        name: Of the search.
        best: Its best trial.
        others: The next ones, best first.
        trials: How many there are.
        start: What the network reached that all trials began from, by goal.
        verdict: Whether the best is better beyond the noise of seeds, if that was tried.
        place: Where the search is kept and tracked.
    """
    lines = [f"**{best.name}** is the best of {trials} trials: {_goals(best.goals)} at step {best.step}.", ""]
    known = [goal for goal in best.goals if goal in start]
    if known:
        gains = ", ".join(f"{goal} {start[goal]:.3f} ({best.goals[goal] - start[goal]:+.3f} since)" for goal in known)
        lines += [f"All trials began from the source-only network: {gains}.", ""]
    settings = [f"`{key}={short_text(str(value))}`" for key, value in sorted(best.settings.items())]
    lines += [f"Its settings: {' '.join(settings)}", ""] if settings else []
    lines += [verdict, ""] if verdict is not None else []
    lines += [f"- {other.name}: {_goals(other.goals)} at step {other.step}" for other in others]
    lines += [""] if others else []
    lines += [
        "The best trial's page has its curves (*Model metrics*) and, under *Artifacts*, its `gallery.png`: images, "
        "labels and predictions. Under *Artifacts* here: `plots` (history, importance, contour, rungs, timeline), "
        "`start` (where all trials begin), `checkpoint` (of the best trial).",
        "",
        "Next:",
        "",
        f"    {command_line('report', name, place=place)}",
        f"    {command_line('finish', 'best', '--search', name, place=place)}",
    ]
    return "\n".join(lines)


def _goals(values: Mapping[str, float]) -> str:
    return ", ".join(f"{goal} {value:.3f}" for goal, value in values.items())


def trial_note(state: str, best: Mapping[str, float], step: int | None, failure: str | None) -> str:
    """Return the description of a trial that has ended."""
    lines = [f"{state[0].upper()}{state[1:]}."]
    if failure is not None:
        lines.append(f"Reason: `{failure}`")
    if step is not None:
        reached = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
        lines.append(f"Best checkpoint at step {step}: {reached}. `{GALLERY}` shows its predictions.")
    return "\n\n".join(lines)
