"""Training stops when losses or gradients are no longer finite, and the error says where that began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.training.checkpoint import find_checkpoints
from timestep_experts.training.stage import Stage

_NEVER = torch.iinfo(torch.int64).max


class FiniteWatch:
    """Remembers on the device at which step a loss or gradient was first not finite; only `require` waits for it.

    Args:
        stage: whose losses and gradients.
        folder: of the stage's checkpoints.
        device: of the losses.
    """

    def __init__(self, stage: Stage, folder: Path, device: torch.device) -> None:
        self.stage, self.folder = stage, folder
        self.losses = torch.full((len(stage.plan.strata),), _NEVER, device=device)
        self.gradients = torch.full((len(stage.param_groups),), _NEVER, device=device)

    def note_losses(self, step: int, strata: Tensor, losses: Tensor) -> None:
        """Losses ``(B,)`` of samples in strata ``(B,)`` at a step, from 0."""
        steps = torch.where(losses.isfinite(), _NEVER, step)
        self.losses.scatter_reduce_(0, strata, steps, "amin")

    def note_gradients(self, step: int, norms: Sequence[Tensor]) -> None:
        """One gradient norm per parameter group."""
        steps = torch.where(torch.stack(list(norms)).to(self.gradients.device).isfinite(), _NEVER, step)
        self.gradients = torch.minimum(self.gradients, steps)

    def require(self) -> None:
        """Look at what was noted, and at the weights.

        Raises:
            UserError: something was not finite; names the stage, the step, the interval and the experts.
        """
        lines = [
            f"the loss of {interval}, of {', '.join(self.stage.group_names_of(interval))}, since step {step + 1}"
            for interval, step in zip(self.stage.plan.strata.intervals, self.losses.tolist(), strict=True)
            if step != _NEVER
        ]
        lines += [
            f"the gradient of {group.name}, since step {step + 1}"
            for group, step in zip(self.stage.param_groups, self.gradients.tolist(), strict=True)
            if step != _NEVER
        ]
        lines += [f"the weights of {group.name}" for group in self.stage.param_groups if not _are_finite(group.leaves)]
        if lines:
            raise UserError(
                f"stage {self.stage.name!r} stopped, for these are not finite:\n  " + "\n  ".join(lines) + "\n"
                f"Nothing was saved since; {self._newest_checkpoint()}. A lower learning rate, a smaller max_grad_norm,"
                " a base in fp32 or bf16, or other training data may help"
            )

    def _newest_checkpoint(self) -> str:
        found = find_checkpoints(self.folder)
        return f"the last checkpoint is {found[-1]}" if found else f"there is no checkpoint yet in {self.folder}"


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(nn.utils.get_total_norm(tensors).isfinite())
