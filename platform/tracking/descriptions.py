"""What MLflow's pages say about a run in words, and on which data it ran."""

import json
from collections.abc import Mapping

from segadapt.platform.storage.command_lines import command_line
from segadapt.platform.storage.folders import Place
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


def search_note(
    name: str, best: str, values: Mapping[str, float], step: int, trials: int, verdict: str | None, place: Place
) -> str:
    """Return the description of a search that has ended, in Markdown."""
    reached = ", ".join(f"{goal} {value:.3f}" for goal, value in values.items())
    lines = [f"**{best}** is the best of {trials} trials: {reached} at step {step}.", ""]
    if verdict is not None:
        lines += [verdict, ""]
    lines += [
        "Under *Artifacts*: `plots` (history, importance, contour, rungs, timeline), `start` (where all trials begin), "
        "`checkpoint` (of the best trial).",
        "",
        "Next:",
        "",
        f"    {command_line('report', name, place=place)}",
        f"    {command_line('finish', 'best', '--search', name, place=place)}",
    ]
    return "\n".join(lines)


def trial_note(state: str, best: Mapping[str, float], step: int | None, failure: str | None) -> str:
    """Return the description of a trial that has ended."""
    lines = [f"{state[0].upper()}{state[1:]}."]
    if failure is not None:
        lines.append(f"Reason: `{failure}`")
    if step is not None:
        reached = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
        lines.append(f"Best checkpoint at step {step}: {reached}. `{GALLERY}` shows its predictions.")
    return "\n\n".join(lines)
