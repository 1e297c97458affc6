"""A network whose weights are the running average of another network's."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

Buffers = Literal["student", "average", "own"]


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

    Parameters that are never trained, such as a frozen backbone's, are shared and not copied.

    Args:
        student: The network to copy.

    Attributes:
        network: The copy.

    Source:
        Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017.
        Differs: buffers, such as batch norm's statistics, are by default the student's own.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        constants = {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
        self.network = copy.deepcopy(student, constants).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def start_from(self, student: nn.Module) -> None:
        """Take over the student's weights."""
        self.network.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module, *, momentum: float = 0.999, buffers: Buffers = "student") -> None:
        """Move the weights: teacher <- momentum * teacher + (1 - momentum) * student.

        Args:
            student: The network this one was copied from; call after its optimiser step.
            momentum: Share of the teacher that stays, in [0, 1].
            buffers: Whether buffers, such as batch norm's running statistics, are copied, averaged as the weights are,
                or stay the teacher's own.
        """
        pairs = zip(self.network.parameters(), student.parameters(), strict=True)
        moved = [(weight, trained) for weight, trained in pairs if weight is not trained]
        if moved:
            weights, students = zip(*moved, strict=True)
            torch._foreach_lerp_(weights, students, 1 - momentum)
        for buffer, current in zip(self.network.buffers(), student.buffers(), strict=True) if buffers != "own" else ():
            if buffers == "average" and buffer.is_floating_point():
                buffer.lerp_(current, 1 - momentum)
            else:
                buffer.copy_(current)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return what the network returns, without gradient."""
        return self.network(images)
