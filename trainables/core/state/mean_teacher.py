"""A network whose weights are the running average of another network's."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def warmed_momentum(step: int, momentum: float = 0.999) -> float:
    """Return the share of a teacher that stays in a step: min(1 - 1 / (step + 1), momentum), 0 in step 0.

    So the teacher is the student at first, and the plain average of its past for the first 1 / (1 - momentum) steps.

    Args:
        step: Optimiser steps that the student has taken.
        momentum: In the long run, in [0, 1]. Paper: 0.99 (DACS), 0.999 (DAFormer, MIC, VFM-UDA).

    Source:
        lhoyer/MIC@2f932a9, mmseg/models/uda/dacs.py.
        Differs: the step is part of a trial's state; there it begins anew on resume, and the teacher with it.
    """
    return min(1 - 1 / (step + 1), momentum)


class MeanTeacher(nn.Module):
    """A copy of a network that follows it slowly. It is not trained and stays in evaluation mode.

    Args:
        student: The network to copy.

    Attributes:
        network: The copy.

    Source:
        Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017.
        Differs: buffers, such as batch norm's statistics, are the student's own.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def start_from(self, student: nn.Module) -> None:
        """Take over the student's weights."""
        self.network.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module, *, momentum: float = 0.999) -> None:
        """Move the weights: teacher <- momentum * teacher + (1 - momentum) * student; buffers are copied.

        Args:
            student: The network this one was copied from; call after its optimiser step.
            momentum: Share of the teacher that stays, in [0, 1].
        """
        for weight, trained in zip(self.network.parameters(), student.parameters(), strict=True):
            weight.lerp_(trained, 1 - momentum)
        for buffer, current in zip(self.network.buffers(), student.buffers(), strict=True):
            buffer.copy_(current)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return what the network returns, without gradient."""
        return self.network(images)
