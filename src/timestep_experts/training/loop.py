"""The training loop. It knows parameter groups, batches and a loss, and not what kind of training they belong to."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from timestep_experts.data import EncodedDataset
from timestep_experts.errors import UserError
from timestep_experts.formats.locks import only_process_in
from timestep_experts.formats.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)
from timestep_experts.models import Family
from timestep_experts.training.batches import Batch, generator_for
from timestep_experts.training.checkpoint import (
    find_states,
    load_latest_checkpoint,
    require_same_fingerprint,
    save_checkpoint,
    set_aside,
)
from timestep_experts.training.finite import FiniteWatch
from timestep_experts.training.log import RunLog
from timestep_experts.training.optimiser import OptimiserSettings, set_learning_rate
from timestep_experts.training.param_group import learning_rate_factor
from timestep_experts.training.signals import noted_signals
from timestep_experts.training.stage import Plan, Precision, Training, gradients_of

RESULT = "result.safetensors"
"""In the folder of a stage: what it trained, once it is finished."""
FINGERPRINT = "fingerprint.json"
"""Beside it: whatever decided its bytes."""
MOST_SKIPPED = 10
NotFinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class LoopSettings:
    """How a stage is run: how often it saves, logs and validates, and in which precision.

    Args:
        optimiser: which one, its schedule and its clip.
        gradient_accumulation_steps: micro-batches per optimiser step; the batch is cut, not multiplied.
        mixed_precision: ``bf16`` runs the denoiser under autocast; parameters and optimiser stay fp32.
        checkpointing_steps: ``None`` writes none but the result.
        checkpoints_total_limit: how many checkpoints are kept; ``None`` keeps all.
        logging_steps: mean losses are written this often.
        validation_steps: how often the observer is called; ``None`` only at the end.
        not_finite: what to do where a gradient is not finite: ``stop``, or ``skip`` the update of those experts and
            count it, up to `MOST_SKIPPED` steps in a row.
    """

    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    gradient_accumulation_steps: int = 1
    mixed_precision: Precision = "no"
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = 2
    logging_steps: int = 10
    validation_steps: int | None = None
    not_finite: NotFinite = "stop"


Observer = Callable[[int, RunLog], None]
"""Called with a step and the log: validation losses, preview pictures."""


def run_stage(
    training: Training,
    dataset: EncodedDataset,
    settings: LoopSettings,
    folder: Path,
    fingerprint: Mapping[str, Any],
    observe: Observer | None = None,
) -> None:
    """Train one stage, going on from the newest checkpoint in ``folder``; a finished stage is only loaded.

    A damaged checkpoint or result is set aside, and what came before it is taken up. A signal to stop (Ctrl-C, SIGTERM)
    ends the running step, saves a checkpoint, and then has its usual effect.

    Args:
        training: the stage, what it changes, and the base.
        dataset: the training set.
        settings: see `LoopSettings`.
        folder: of the stage; receives ``checkpoint-N/``, ``log.jsonl``, ``tensorboard/`` and ``result.safetensors``.
        fingerprint: what the run is; a folder of a run with another fingerprint is refused.
        observe: called every ``validation_steps`` and at the end.

    Raises:
        UserError: the folder holds another run or another process works in it, captions are to be dropped where there
            is no empty one, or a loss, gradient or weight is not finite; the last checkpoint is kept then.
    """
    _require_empty_caption(training.stage.plan, training.family)
    with only_process_in(folder):
        finished = load_result(folder, fingerprint)
        if finished is not None:
            training.trainee.load_state_dict(finished)
            return
        with noted_signals() as noted:
            _train(training, dataset, settings, folder, fingerprint, observe, noted)
        number = noted()
    if number is not None:
        signal.raise_signal(number)


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder holds its result."""
    return (folder / RESULT).is_file() and (folder / FINGERPRINT).is_file()


def stored_fingerprint(folder: Path) -> dict[str, Any] | None:
    """Whose a stage's folder is: of its result, or of its newest sound checkpoint; ``None`` where it has neither."""
    documents = [folder / FINGERPRINT] if is_finished(folder) else []
    for path in (*documents, *reversed(find_states(folder))):
        try:
            stored = read_sealed_json(path)
        except DamagedError:
            continue
        return stored if path in documents else dict(stored["fingerprint"])
    return None


def load_result(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What a finished stage trained; ``None`` if it is not finished, or its result is damaged and was set aside.

    Raises:
        UserError: the folder holds another run.
    """
    if not is_finished(folder):
        return None
    try:
        require_same_fingerprint(read_sealed_json(folder / FINGERPRINT), fingerprint, folder)
        return read_sealed_tensors(folder / RESULT)
    except DamagedError as error:
        set_aside(folder / RESULT, error)
        return None


def _train(
    training: Training,
    dataset: EncodedDataset,
    settings: LoopSettings,
    folder: Path,
    fingerprint: Mapping[str, Any],
    observe: Observer | None,
    noted: Callable[[], signal.Signals | None],
) -> None:
    """Train a stage to its end, or to the end of the step in which a signal comes."""
    stage, trainee = training.stage, training.trainee
    optimiser = settings.optimiser.build(stage.param_groups)
    start = _start(training, optimiser, folder, fingerprint)
    watch = FiniteWatch(stage, folder, training.family.device)
    stepper = _Stepper(training, dataset, optimiser, settings, watch)
    with RunLog(folder, start) as log, gradients_of(training):
        bar = tqdm(range(start, stage.num_steps), desc=stage.name, initial=start, total=stage.num_steps, unit="step")
        for step in bar:
            stepper.step(step)
            done, is_last = step + 1, step + 1 == stage.num_steps
            is_logged = is_last or _is_due(done, settings.logging_steps)
            is_stopped = noted() is not None and not is_last
            is_saved = is_stopped or (_is_due(done, settings.checkpointing_steps) and not is_last)
            is_observed = is_last or _is_due(done, settings.validation_steps)
            if is_logged or is_saved or is_observed:
                watch.require()
            if is_logged:
                values = stepper.take_log(done)
                log.write(done, values)
                bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}")
            if is_saved:
                limit = settings.checkpoints_total_limit
                save_checkpoint(folder, done, trainee.state_dict(), optimiser, fingerprint, limit)
            if is_stopped:
                bar.write(f"stopped after step {done} of {stage.num_steps}, which is saved in {folder}", sys.stderr)
                return
            if observe and is_observed:
                observe(done, log)
                stepper.restart_clock()
    write_sealed_json(folder / FINGERPRINT, fingerprint)
    write_sealed_tensors(folder / RESULT, trainee.state_dict())


class _Stepper:
    """One optimiser step after the other, and the sums of what is logged."""

    def __init__(
        self,
        training: Training,
        dataset: EncodedDataset,
        optimiser: torch.optim.Optimizer,
        settings: LoopSettings,
        watch: FiniteWatch,
    ) -> None:
        self.stage, self.family, self.dataset = training.stage, training.family, dataset
        self.optimiser, self.settings, self.watch = optimiser, settings, watch
        schedule = settings.optimiser
        self.factors = [
            learning_rate_factor(schedule.lr_scheduler, schedule.lr_warmup_steps, group.max_train_steps)
            for group in self.stage.param_groups
        ]
        self.parameters = self.stage.parameters()
        self.num_skipped = self.num_in_a_row = 0
        self._forget_log()

    def step(self, step: int) -> None:
        """Draw the batch of a step, run it, share out the gradients among the experts, and update them."""
        batch = self.stage.plan.draw(self.dataset, self.family, step)
        self.stage.set_mode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(self.stage.plan.seed, self.stage.name, "dropout", step).initial_seed())
            for chunk in batch.chunks(self.settings.gradient_accumulation_steps):
                self._backward(step, chunk)
        norms = []
        for group, param_group, factor in zip(
            self.optimiser.param_groups, self.stage.param_groups, self.factors, strict=True
        ):
            if step < param_group.max_train_steps:
                set_learning_rate(group, param_group.learning_rate * factor(step))
                norms.append(param_group.take_gradients(self.settings.optimiser.max_grad_norm))
            else:
                norms.append(self.loss_sums.new_zeros(()))
        if self.settings.not_finite == "skip":
            norms = self._skip_broken(norms)
        self.watch.note_gradients(step, norms)
        self.optimiser.step()
        for param_group in self.stage.param_groups:
            param_group.drop_gradients()
        for parameter in self.parameters:
            parameter.grad = None
        self.stage.after_step(step + 1)

    def _skip_broken(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """Drop gradients that are not finite; their norms count as 0, unless that happens too often in a row."""
        broken = [not bool(norm.isfinite()) for norm in norms]
        self.num_in_a_row = self.num_in_a_row + 1 if any(broken) else 0
        if self.num_in_a_row > MOST_SKIPPED:
            return list(norms)
        for param_group, is_broken in zip(self.stage.param_groups, broken, strict=True):
            if is_broken:
                param_group.drop_gradients()
                self.num_skipped += 1
        return [norm.new_zeros(()) if is_broken else norm for norm, is_broken in zip(norms, broken, strict=True)]

    def _backward(self, step: int, chunk: Batch) -> None:
        precision = self.settings.mixed_precision
        losses = self.stage.objective.backward(step, self.family, self.dataset, chunk, precision)
        strata = self.stage.plan.strata.index_of(chunk.t.to(losses.device))
        is_counted = torch.ones_like(losses)
        if self.settings.not_finite == "skip":
            is_counted = losses.isfinite().to(losses.dtype)
            losses = losses.nan_to_num(0.0, 0.0, 0.0)
        self.watch.note_losses(step, strata, losses)
        self.loss_sums.index_add_(0, strata, losses)
        self.loss_counts.index_add_(0, strata, is_counted)

    def take_log(self, step: int) -> dict[str, float]:
        """Mean losses since the last time, rates, samples seen; the only place where the host waits for the device."""
        strata, means = self.stage.plan.strata.intervals, (self.loss_sums / self.loss_counts).tolist()
        seen = {f"loss/{s}": m for s, m, n in zip(strata, means, self.loss_counts.tolist(), strict=True) if n}
        values = {"loss": sum(seen.values()) / len(seen)} if seen else {}
        if self.settings.not_finite == "skip":
            values["skipped_updates"] = self.num_skipped
        if len(strata) > 1:
            values |= seen
        active = [float(group["lr"]) for group in self.optimiser.param_groups]
        values |= {"learning_rate": max(active), "seconds": time.perf_counter() - self.started}
        values["num_images_seen"] = step * self.stage.plan.batch_size
        values |= self.stage.report()
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


def _require_empty_caption(plan: Plan, family: Family) -> None:
    if plan.caption_dropout and not family.has_empty_caption:
        raise UserError(
            f"{family.source}: every caption of this model is a class, so none can be dropped; caption_dropout must be"
            f" 0, got {plan.caption_dropout:g}"
        )


def _start(training: Training, optimiser: torch.optim.Optimizer, folder: Path, fingerprint: Mapping[str, Any]) -> int:
    """Steps done; trainee and optimiser are put where they were then."""
    resumed = load_latest_checkpoint(folder, optimiser, fingerprint)
    if resumed is None:
        training.stage.prepare()
        return 0
    step, tensors = resumed
    training.trainee.load_state_dict(tensors)
    return step


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
