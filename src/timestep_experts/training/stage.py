"""A stage of training: what learns, from which samples, and by which loss. The loop runs any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Interval, Partition
from timestep_experts.models import Family
from timestep_experts.objectives import squared_error
from timestep_experts.training.batches import Batch
from timestep_experts.training.param_group import ParamGroup

Precision = Literal["no", "bf16"]


class Trainable(Protocol):
    """What a stage changes: a mixture, a copy of the denoiser, or several networks together."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold beside the optimiser's state."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> None:
        """Load what `state_dict` returned."""
        ...

    def trained_modules(self) -> Iterable[nn.Module]:
        """The modules that are put into training mode; only what the parameter groups own is not frozen."""
        ...


class Plan(Protocol):
    """How batches are drawn, as a pure function of the step."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        ...

    @property
    def strata(self) -> Partition:
        """The intervals by which losses are logged."""
        ...

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        ...

    @property
    def caption_dropout(self) -> float:
        """Probability of the empty caption."""
        ...

    def draw(self, dataset: EncodedDataset, family: Family, step: int) -> Batch:
        """The samples of a step, from 0."""
        ...


class Objective(Protocol):
    """A loss and its gradients."""

    def backward(
        self, step: int, /, family: Family, dataset: EncodedDataset, chunk: Batch, precision: Precision
    ) -> Tensor:
        """Add the gradients of a part of a step's batch to those that are there.

        Returns:
            The loss of each sample, ``(B,)``, without its graph.
        """
        ...


@dataclass(frozen=True)
class Denoising:
    """The base's own loss (TSM, eq. 3): the prediction of the denoiser against its target.

    Args:
        samples_per_mean: the loss is summed over samples and divided by this; with b samples per stratum, b gives the
            sum over strata of their mean losses.
    """

    samples_per_mean: int

    def backward(
        self, _step: int, /, family: Family, dataset: EncodedDataset, chunk: Batch, precision: Precision
    ) -> Tensor:
        """See `Objective`."""
        with torch.autocast(family.device.type, torch.bfloat16, enabled=precision == "bf16"):
            denoised = family.denoise(chunk.samples(dataset, family))
        losses = squared_error(denoised.predicted, denoised.target)
        (losses.sum() / self.samples_per_mean).backward()  # type: ignore[no-untyped-call]
        return losses.detach()


@dataclass(frozen=True)
class Stage:
    """One stage of training: what learns, from which samples, and by which loss.

    Args:
        name: names the folder, and separates the random numbers of stages.
        param_groups: what is optimised; everything else stays frozen.
        plan: how batches are drawn.
        objective: what is minimised.
        set_mode: called before each step; puts a mixture into the mode of this stage.
        prepare: changes the trainee before the first step, and not when resuming.
        after_step: called after each optimiser step, with the number of steps done.
        report: gives further values for the log, of the steps since it was last called.
    """

    name: str
    param_groups: Sequence[ParamGroup]
    plan: Plan
    objective: Objective
    set_mode: Callable[[], None] = lambda: None
    prepare: Callable[[], None] = lambda: None
    after_step: Callable[[int], None] = lambda _: None
    report: Callable[[], Mapping[str, float]] = dict

    @property
    def num_steps(self) -> int:
        """Until the budget of the last parameter group is spent."""
        return max(group.max_train_steps for group in self.param_groups)

    def parameters(self) -> list[nn.Parameter]:
        """The stacked parameters of which parameter groups own slices, each once."""
        return list({id(p): p for group in self.param_groups for p, _ in group.slices}.values())

    def group_names_of(self, stratum: Interval) -> list[str]:
        """The names of the groups that learn from a stratum's samples."""
        return [g.name for g in self.param_groups if g.interval is None or g.interval.covers(stratum)]


@dataclass(frozen=True)
class Training:
    """A stage, what it changes, and the base model around that.

    Args:
        stage: to be run.
        trainee: what the stage changes in place, such as a mixture on the family's denoiser.
        family: the base, with the trainee in it.
    """

    stage: Stage
    trainee: Trainable
    family: Family


@contextmanager
def gradients_of(training: Training) -> Iterator[None]:
    """While open, exactly the stage's parameters require gradients, and dropout is on."""
    modules = list(training.trainee.trained_modules())
    for module in modules:
        module.requires_grad_(False).train()
    for parameter in training.stage.parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(False).eval()
