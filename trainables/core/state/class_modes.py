"""Learnable modes of each class, and which of them are in use."""

# B images, D embedding channels, C classes, M modes per class, h x w cells of the feature map.

import torch
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import to_device
from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labelling.features import count_values
from segadapt.trainables.core.losses.mode_alignment import pick_unit_vectors, places_among

CENTER_DEVIATION = 0.1
OFFSET_DEVIATION = 0.05


class ClassModes(nn.Module):
    """M representatives of each class in the embedding space. Losses normalise them.

    They start as r_{k,m} = g_k + o_m, with g from N(0, 0.1²) per class and o from N(0, 0.05²) shared by the classes.

    The optimiser sees the change of the modes since its last step as the parameter, which is zero when it steps: so its
    weight decay, which would only shrink directions that are normalised anyway, does nothing to them. Gradients and
    momentum are those of the modes themselves.

    Args:
        classes: C.
        modes: M, at least 1.
        channels: D.

    Attributes:
        base: The modes before the last optimiser step, (C, M, D).
        change: What the optimiser added in that step, (C, M, D).
        idle_steps: Steps that showed a class without any cell nearest to the mode, since the last one with such a cell,
            (C, M), int64.

    Source:
        Iqbal et al., DRSL, arXiv 2206.09683, describes multi-modal classes; no code was public. Number, start and
        missing weight decay follow Karlinsky et al., RepMet, CVPR 2019. Replacing idle modes is ours.
    """

    base: Tensor
    idle_steps: Tensor

    def __init__(self, classes: int, modes: int, channels: int) -> None:
        super().__init__()
        centers = CENTER_DEVIATION * torch.randn(classes, 1, channels)
        offsets = OFFSET_DEVIATION * torch.randn(1, modes, channels)
        self.register_buffer("base", centers + offsets)
        self.register_buffer("idle_steps", torch.zeros(classes, modes, dtype=torch.int64))
        self.change = nn.Parameter(torch.zeros(classes, modes, channels))

    def forward(self) -> Tensor:
        """Return the modes, (C, M, D), with gradient; call it in every training step."""
        with torch.no_grad():
            self.base += self.change
            self.change.zero_()
        return self.base + self.change

    def active_share(self, within: int = 100) -> float:
        """Return the share of modes nearest to a cell in one of the last `within` steps that showed their class."""
        return float((self.idle_steps < within).double().mean())

    @torch.no_grad()
    def track(
        self,
        embeddings: Tensor,
        nearest: Tensor,
        other_nearest: Tensor | None = None,
        *,
        patience: int,
        generator: torch.Generator,
    ) -> None:
        """Count idle steps; put each mode that idles too long on a random cell of its class, keeping its length.

        Cells of all data-parallel workers count, and every worker must call this equally often.

        Args:
            embeddings: Source embeddings, (B, D, h, w), from which modes are put.
            nearest: Mode of each source cell, (B, h, w) int64, from `mode_margin`; -1 for none.
            other_nearest: Mode of each target cell, of any size. They keep modes in use but place none: their
                labels may be wrong.
            patience: Idle steps after which a mode is put anew, in the next step whose source shows its class.
            generator: On the CPU, in the same state on every worker.
        """
        classes, modes = self.idle_steps.shape
        cells = sum_over_workers(
            torch.stack([self._cells(nearest), self._cells(nearest[:0] if other_nearest is None else other_nearest)])
        )
        nearest_to_a_cell = cells.sum(dim=0) > 0
        shown_classes = nearest_to_a_cell.any(dim=1, keepdim=True)
        available = cells[0].sum(dim=1)
        idle_steps = torch.where(nearest_to_a_cell, 0, self.idle_steps + shown_classes)
        dead = (idle_steps >= patience) & (available > 0).unsqueeze(1)
        self.idle_steps.copy_(idle_steps.masked_fill(dead, 0))
        # All modes draw a cell and the dead ones take it: to ask whether there are any, a GPU would be waited for.
        mode_classes = torch.arange(classes, device=dead.device).repeat_interleave(modes)
        positions = to_device(torch.rand(dead.numel(), generator=generator, dtype=torch.float64), dead.device)
        cells_of_class = available[mode_classes]
        positions = positions[places_among(dead.flatten())]
        drawn = (positions * cells_of_class).long().minimum(cells_of_class - 1)
        cell_classes = nearest.div(modes, rounding_mode="floor")
        placed = torch.where(dead.flatten(), mode_classes, -1)
        rows = sum_over_workers(pick_unit_vectors(embeddings, cell_classes, placed, drawn, num_groups=classes))
        lengths = self.base.norm(dim=2, keepdim=True)
        self.base.copy_(torch.where(dead.unsqueeze(2), rows.view_as(self.base) * lengths, self.base))

    def _cells(self, nearest: Tensor) -> Tensor:
        """Return this worker's cells of each mode, (C, M) int64."""
        counts = count_values(nearest + 1, self.idle_steps.numel() + 1)[1:]
        return counts.view_as(self.idle_steps)
