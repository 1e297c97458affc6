"""One of two workers, the second of which runs out of memory: two_workers_memory.py RANK FOLDER ATTEMPT."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_memory import limit
from toy import toy_config, toy_trainer


def main(rank: int, folder: Path, attempt: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{attempt}", world_size=2, rank=rank)
    trainer, reports = toy_trainer(toy_config("source_only"), folder)
    if rank == 1:
        limit(trainer, 1)
    trainer.run()
    if rank == 0:
        reports.checkpoint(len(reports.metrics) - 1).rename(folder / "last")
    del trainer, reports
    gc.collect()  # what still refers to the group would end with the interpreter, after the group's threads
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
