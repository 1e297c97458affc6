"""Target mIoU on streets before and after `segadapt finish`: two rounds of self-training behind each method.

    python benchmarks/finish.py [--methods sdca ...] [--seeds 0 1 2] [--rounds 2] [--keep-losses] [--json PATH]
                                [--folder PATH] [KEY=VALUE ...]

A trial of each method at the default length, at its preset `streets` where it has one and its published setting
otherwise, is finished as the command does it, but from its last checkpoint: to know the best one takes target labels.
`KEY=VALUE` settings act on the finish. All trials of a seed start from that seed's source-only network. Trained trials
and finishes are kept in `--folder`, and not trained again.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from segadapt import search_spaces
from segadapt.platform.experiment.finishing import finish_settings
from segadapt.platform.settings.config import TrialConfig, Values, flatten, parse_assignments, resolve
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.training import build_method
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.labelling.files import PseudoLabelFolder
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

METHOD_NAMES = [method.name for method in METHODS if method.name not in ("source_only", "self_training")]
CHECKPOINT, RESULTS = "checkpoint", "results.json"


def train(config: TrialConfig, start: Path | None, folder: Path) -> list[dict[str, Any]]:
    """Train a method's own stages, or the warm-up; returns what was reported at the start and after each stage.

    Args:
        config: Of the trial.
        start: Checkpoint to begin from; None trains the warm-up alone.
        folder: Gets the last checkpoint and what is returned; if it has them, nothing is trained.
    """
    if (folder / RESULTS).exists():
        found: list[dict[str, Any]] = json.loads((folder / RESULTS).read_text())
        return found
    (folder / CHECKPOINT).mkdir(parents=True)
    data, evaluation = load_data(config.data)
    plan = method_class(config.method_name).plan(config.method)
    plan = tuple(stage for stage in plan if (stage is SOURCE_ONLY) == (start is None))
    reported: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], write: Any) -> None:
        if metrics["stage_finished"] or metrics["step"] == 0:
            reported.append({name: metrics[name] for name in ("stage", "target_val/miou", "source_val/miou")})
        if metrics["finished"]:
            write(folder / CHECKPOINT)

    settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    with tempfile.TemporaryDirectory() as name:
        method = build_method(config, len(data.classes))
        trainer = Trainer(method, plan, data, evaluation, settings, report, Path(name))
        if start is not None:
            trainer.start_from(start)
        trainer.run()
        for entry, stage in zip(reported[-len(plan) :], plan, strict=True):
            if stage.pseudo_labels:
                labels = PseudoLabelFolder(Path(name) / stage.name, data.target.ids)
                entry["labelled_share"] = labels.provenance["labelled_share"]
    (folder / RESULTS).write_text(json.dumps(reported))
    return reported


def finish_trial(
    method: str, seed: int, values: Values, keep_losses: bool, folder: Path, trial_values: Values
) -> list[dict[str, Any]]:
    """Return mIoU of a trial of the method, with settings of its own, and of its finish after each round."""
    start = folder / f"warmup-{seed}"
    train(resolve("source_only", {**trial_values, "seed": seed}), None, start)
    config = resolve(method, {**search_spaces.load(method)[1].get("streets", {}), **trial_values, "seed": seed})
    trial = folder / f"{method}-{seed}"
    train(config, start / CHECKPOINT, trial)
    trained = dict(flatten(json.loads(json.dumps(config.as_dict()))))
    settings = finish_settings(method, trained, values, keep_losses=keep_losses)
    name = "-".join([f"{key}={value}" for key, value in sorted(values.items())] + ["kept"] * keep_losses)
    return train(resolve("self_training", settings), trial / CHECKPOINT, folder / f"{method}-{seed}-finish-{name}")


def table(results: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> str:
    """Return the results as a Markdown table: mean ± sample standard deviation over seeds."""
    rounds = max(len(found) - 1 for seeds in results.values() for found in seeds.values())
    columns = ["before", *(f"after round {number}" for number in range(1, rounds + 1))]
    lines = [
        f"| method | seeds | {' | '.join(columns)} | change by seed | source mIoU |",
        "|---|" + "---|" * (rounds + 4),
    ]
    for method, seeds in results.items():
        runs = list(seeds.values())
        cells = [_spread([run[index]["target_val/miou"] for run in runs]) for index in range(rounds + 1)]
        changes = ", ".join(f"{run[-1]['target_val/miou'] - run[0]['target_val/miou']:+.3f}" for run in runs)
        source = [statistics.mean(run[index]["source_val/miou"] for run in runs) for index in (0, -1)]
        cells += [changes, f"{source[0]:.3f} → {source[1]:.3f}"]
        lines.append(f"| {method} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES, choices=METHOD_NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep-losses", action="store_true")
    parser.add_argument("--trial", nargs="+", default=[], metavar="KEY=VALUE", help="of the warm-up and the trials")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    values = {**parse_assignments(options.settings), "method.rounds": options.rounds}
    trial_values = parse_assignments(options.trial)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            for method in options.methods:
                folder = options.folder or Path(temporary)
                found = finish_trial(method, seed, values, options.keep_losses, folder, trial_values)
                results.setdefault(method, {})[seed] = found
                shown = " -> ".join(f"{entry['target_val/miou']:.3f}" for entry in found)
                print(f"seed {seed} {method:14} {shown}", file=sys.stderr, flush=True)
                if options.json:
                    content = {
                        "settings": values,
                        "keep_losses": options.keep_losses,
                        "results": results,
                        "environment": machine(),
                    }
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
