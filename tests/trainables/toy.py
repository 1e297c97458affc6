"""A trainer on a tiny streets world, for tests of every method."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from segadapt.platform.settings.config import TrialConfig, resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.method import Stage
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

TOY = {
    "data.streets.edition": 1,
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 9,
    "data.streets.val_images": 4,
    "warmup.steps": 4,
    "trainer.steps": 6,
    "trainer.eval_every": 2,
    "trainer.batch_size": 4,
    "optimizer.lr": 0.01,
}


def toy_config(method: str, **values: Any) -> TrialConfig:
    return resolve(method, TOY | {key.replace("__", "."): value for key, value in values.items()})


def keeping_losses(trial: TrialConfig, **values: Any) -> TrialConfig:
    """Return a finish of the trial in two rounds that keeps its losses."""
    kept = {"method__kept_method": trial.method_name, "method__kept_settings": asdict(trial.method)}
    return toy_config("self_training", **{"method__rounds": 2, "trainer__steps": 4, **kept, **values})


def toy_trainer(config: TrialConfig, folder: Path, plan: tuple[Stage, ...] | None = None) -> tuple[Trainer, "Reports"]:
    data, evaluation = load_data(config.data)
    method = build_method(config, len(data.classes))
    settings = TrainerSettings(
        trainer=config.trainer, optimizer=config.optimizer, augmentation=config.augmentation, seed=config.seed
    )
    reports = Reports(folder / "checkpoints")
    plan = plan or method_class(config.method_name).plan(config.method)
    return Trainer(method, plan, data, evaluation, settings, reports, folder / "artifacts"), reports


class Reports:
    """Keeps every reported evaluation and its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[dict[str, Any]] = []

    def __call__(self, metrics: dict[str, Any], write: Any) -> None:
        if write is not None:
            path = self.checkpoint(len(self.metrics))
            path.mkdir(parents=True)
            write(path)
        self.metrics.append(metrics)

    def checkpoint(self, index: int) -> Path:
        return self.folder / f"{index:03d}"
