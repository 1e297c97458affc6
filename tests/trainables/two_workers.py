"""One data-parallel worker: two_workers.py METHOD WORKERS RANK FOLDER [WORD...]. Writes FOLDER/last on the first.

With `finish`, the trial is followed by self-training that keeps its losses; with `lora`, a transformer is tuned. With
`online`, online self-training is added, on a transformer of which tokens are masked.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toy import keeping_losses, toy_config, toy_trainer

from segadapt.trainables import method_class
from segadapt.trainables.core.method import SOURCE_ONLY

LORA: dict[str, Any] = {
    "network__name": "timm:test_vit",
    "network__tune": "lora",
    "network__lora_rank": 4,
    "optimizer__name": "sgd",  # AdamW makes as much of a gradient of rounding errors as of any other
    "optimizer__lr": 0.1,
}
ONLINE: dict[str, Any] = {
    "online__enabled": True,
    "online__mask": "token",
    "online__rare_class_temperature": 0.1,
    "network__name": "timm:test_vit",
    "method__feature": "backbone",
    "optimizer__name": "sgd",
}


def main(name: str, workers: int, rank: int, folder: Path, *words: str) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", world_size=workers, rank=rank)
    common: dict[str, Any] = {"optimizer__lr": 0.003, "augmentation__hue": 0.0, "trainer__eval_batch_size": 1}
    common |= LORA if "lora" in words else {}
    common |= ONLINE if "online" in words else {}
    config = toy_config(name, warmup__steps=2, trainer__steps=6, **common)
    trainer, reports = toy_trainer(config, folder)
    trainer.run()
    assert trainer.plan[0] is SOURCE_ONLY
    if "finish" in words:
        start = reports.checkpoint(len(reports.metrics) - 1)
        config = keeping_losses(config, **common)
        trainer, reports = toy_trainer(
            config, folder / "finish", method_class(config.method_name).plan(config.method)[1:]
        )
        if workers > 1:
            dist.barrier()  # the first worker writes the checkpoint
        trainer.start_from(start)
        trainer.run()
    if rank == 0:
        reports.checkpoint(len(reports.metrics) - 1).rename(folder / "last")
    if workers > 1:
        del trainer, reports
        gc.collect()  # what still refers to the group would end with the interpreter, after the group's threads
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
