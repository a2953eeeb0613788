"""The training loop. It knows learners, batches and a loss; what is fostered or assembled it does not know."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from timestep_experts.data import EncodedPictures
from timestep_experts.formats.atomic import write_json, write_tensors
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family
from timestep_experts.objectives import squared_error
from timestep_experts.training.batches import Batch, BatchPlan, generator_for
from timestep_experts.training.checkpoint import load_latest_checkpoint, require_same_identity, save_checkpoint
from timestep_experts.training.learner import Learner, learning_rate_factor
from timestep_experts.training.log import RunLog

Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class OptimiserSettings:
    """Any optimiser of ``torch.optim``, by name.

    Args:
        name: e.g. ``AdamW``.
        options: its keyword arguments, but for the learning rate.
        lr_scheduler: a schedule of diffusers, e.g. ``constant``, ``constant_with_warmup``, ``linear``, ``cosine``.
        lr_warmup_steps: of the schedule.
        max_grad_norm: per learner; ``None`` clips nothing.
    """

    name: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=lambda: {"weight_decay": 1e-2})
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0

    def build(self, learners: Sequence[Learner]) -> torch.optim.Optimizer:
        """One parameter group per learner; the fused implementation where there is one.

        Raises:
            ValueError: no such optimiser, or it does not take one of the options.
        """
        kind = getattr(torch.optim, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"torch.optim has no optimiser {self.name!r}")
        accepted = inspect.signature(kind).parameters
        unknown = [name for name in self.options if name not in accepted]
        if unknown:
            raise ValueError(f"{self.name} takes no {', '.join(unknown)}; it takes {', '.join(accepted)}")
        options = dict(self.options)
        if "fused" in accepted:
            options.setdefault("fused", True)
        groups = [{"params": learner.leaves, "lr": learner.learning_rate} for learner in learners]
        return kind(groups, **options)


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, how precisely.

    Args:
        gradient_accumulation_steps: micro-batches per optimiser step; the batch is cut, not multiplied.
        mixed_precision: ``bf16`` runs the denoiser under autocast; parameters and optimiser stay fp32.
        checkpointing_steps: ``None`` writes none but the result.
        checkpoints_total_limit: how many to keep.
        logging_steps: mean losses are written this often.
        validation_steps: how often the observer is called; ``None`` only at the end.
    """

    gradient_accumulation_steps: int = 1
    mixed_precision: Precision = "no"
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = 2
    logging_steps: int = 10
    validation_steps: int | None = None


Observer = Callable[[int, RunLog], None]
"""Called with a step and the log: validation losses, preview pictures."""


@dataclass(frozen=True)
class Stage:
    """One piece of training: what learns, from which samples, while which experts speak.

    Args:
        name: of its folder and its random numbers.
        learners: what is optimised; everything else stays frozen.
        plan: how batches are drawn.
        speak: puts the mixture into the mode of this stage.
        prepare: changes the mixture before the first step, and not when resuming.
    """

    name: str
    learners: Sequence[Learner]
    plan: BatchPlan
    speak: Callable[[], None]
    prepare: Callable[[], None] = lambda: None

    @property
    def num_steps(self) -> int:
        """Until the last learner's budget is spent."""
        return max(learner.max_train_steps for learner in self.learners)


def run_stage(
    stage: Stage,
    mixture: Mixture,
    family: Family,
    pictures: EncodedPictures,
    optimiser_settings: OptimiserSettings,
    settings: LoopSettings,
    folder: Path,
    identity: Mapping[str, Any],
    observe: Observer | None = None,
) -> None:
    """Train one stage, going on from the newest checkpoint in ``folder``; a finished stage is only loaded.

    Args:
        stage: what to do.
        mixture: attached to the family's denoiser; its tensors are changed in place.
        family: the base.
        pictures: the training set.
        optimiser_settings: see there.
        settings: see there.
        folder: of the stage; receives ``checkpoint-N/``, ``log.jsonl``, ``tensorboard/`` and ``result.safetensors``.
        identity: what the run is; a folder of a run with another identity is refused.
        observe: called every ``validation_steps`` and at the end.

    Raises:
        ValueError: the folder holds another run.
    """
    result = folder / "result.safetensors"
    if result.is_file():
        require_same_identity(_read_identity(folder), identity, folder)
        mixture.load_state_dict(load_file(result))
        return
    optimiser = optimiser_settings.build(stage.learners)
    resumed = load_latest_checkpoint(folder, optimiser, identity)
    if resumed is None:
        start = 0
        stage.prepare()
    else:
        start, experts = resumed
        mixture.load_state_dict(experts)
    stepper = _Stepper(stage, mixture, family, pictures, optimiser, optimiser_settings, settings)
    with RunLog(folder, start) as log, stepper.gradients():
        bar = tqdm(range(start, stage.num_steps), desc=stage.name, initial=start, total=stage.num_steps, unit="step")
        for step in bar:
            stepper.step(step)
            done = step + 1
            if done % settings.logging_steps == 0 or done == stage.num_steps:
                values = stepper.take_log(done)
                log.write(done, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
            if settings.checkpointing_steps and done % settings.checkpointing_steps == 0 and done < stage.num_steps:
                limit = settings.checkpoints_total_limit
                save_checkpoint(folder, done, mixture.state_dict(), optimiser, identity, limit)
            if observe and (done == stage.num_steps or _is_due(done, settings.validation_steps)):
                observe(done, log)
                stepper.restart_clock()
    write_json(folder / "identity.json", dict(identity))
    write_tensors(result, mixture.state_dict())


class _Stepper:
    """One optimiser step after the other, and the sums of what is logged."""

    def __init__(
        self,
        stage: Stage,
        mixture: Mixture,
        family: Family,
        pictures: EncodedPictures,
        optimiser: torch.optim.Optimizer,
        optimiser_settings: OptimiserSettings,
        settings: LoopSettings,
    ) -> None:
        self.stage, self.mixture, self.family, self.pictures = stage, mixture, family, pictures
        self.optimiser, self.settings = optimiser, settings
        self.max_grad_norm = optimiser_settings.max_grad_norm
        self.factors = [
            learning_rate_factor(optimiser_settings.lr_scheduler, optimiser_settings.lr_warmup_steps, steps)
            for steps in (learner.max_train_steps for learner in stage.learners)
        ]
        self.parameters = {id(p): p for learner in stage.learners for p, _ in learner.slices}
        self._forget_log()

    def gradients(self) -> _RequiresGrad:
        """While open, exactly this stage's parameters require gradients."""
        return _RequiresGrad(self.mixture, list(self.parameters.values()))

    def step(self, step: int) -> None:
        """Draw, run, share out the gradients, update."""
        batch = self.stage.plan.draw(self.pictures, self.family, step)
        self.stage.speak()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(self.stage.plan.seed, self.stage.name, "dropout", step).initial_seed())
            for chunk in batch.chunks(self.settings.gradient_accumulation_steps):
                self._backward(chunk)
        for group, learner, factor in zip(self.optimiser.param_groups, self.stage.learners, self.factors, strict=True):
            if step < learner.max_train_steps:
                group["lr"] = learner.learning_rate * factor(step)
                learner.take_gradients(self.max_grad_norm)
        self.optimiser.step()
        for learner in self.stage.learners:
            learner.drop_gradients()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _backward(self, chunk: Batch) -> None:
        family, device = self.family, self.family.device
        latents = self.pictures.latents[chunk.rows].to(device)
        noise, t = chunk.noise.to(device), chunk.t.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            conditioning = self.pictures.features_at(family, chunk.rows, t, chunk.dropped)
            predicted = family.predict(family.noise.add_noise(latents, noise, t), t, conditioning)
        losses = squared_error(predicted, family.noise.target(latents, noise, t))
        (losses.sum() / self.stage.plan.samples_per_stratum).backward()  # type: ignore[no-untyped-call]
        strata = self.stage.plan.strata.index_of(t)
        self.loss_sums.index_add_(0, strata, losses.detach())
        self.loss_counts.index_add_(0, strata, torch.ones_like(losses))

    def take_log(self, step: int) -> dict[str, float]:
        """Mean losses since the last time, rates, samples seen; the only place where the host waits for the device."""
        means = (self.loss_sums / self.loss_counts).tolist()
        values = {"loss": sum(means) / len(means)}
        if len(means) > 1:
            values |= {f"loss/{stratum}": m for stratum, m in zip(self.stage.plan.strata.intervals, means, strict=True)}
        active = [group["lr"] for group in self.optimiser.param_groups]
        values |= {"learning_rate": max(active), "seconds": time.perf_counter() - self.started}
        values["num_images_seen"] = step * len(self.stage.plan.strata) * self.stage.plan.samples_per_stratum
        self._forget_log()
        return values

    def restart_clock(self) -> None:
        """Leave the time since the last log out of the count: it was not spent on training."""
        self.started = time.perf_counter()

    def _forget_log(self) -> None:
        device = self.family.device
        self.loss_sums = torch.zeros(len(self.stage.plan.strata), device=device)
        self.loss_counts = torch.zeros_like(self.loss_sums)
        self.restart_clock()


class _RequiresGrad:
    """A context in which exactly some parameters of a mixture require gradients, and its dropout is on."""

    def __init__(self, mixture: Mixture, parameters: Sequence[Tensor]) -> None:
        self.mixture, self.parameters = mixture, parameters

    def __enter__(self) -> None:
        for layer in self.mixture.layers.values():
            layer.requires_grad_(False).train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for layer in self.mixture.layers.values():
            layer.requires_grad_(False).eval()


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _read_identity(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    return stored
