"""What an interval means, in every unit and in other trainers' words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from rich.console import Group
from rich.table import Table

from timestep_experts.errors import UserError
from timestep_experts.inference.sample import make_scheduler
from timestep_experts.intervals import (
    Interval,
    LogitNormalDensity,
    Partition,
    TimestepDensity,
    UniformDensity,
    inference_timesteps,
    is_flow,
    log_snr_of,
    mass_per_interval,
    sigma_of,
    steps_per_interval,
    takes_flow_sigmas,
)
from timestep_experts.models import resolve_model
from timestep_experts.models.noise import flow_shift


def load_scheduler(name: str, shift: float | None) -> Any:
    """A scheduler by its diffusers class (with Stable Diffusion's noise schedule, or a flow), or of a model's folder.

    Args:
        name: of the class or folder.
        shift: of a flow scheduler. A multistep class that is given one is told to be of a flow model, and a model
            whose shift depends on the size of a picture has this one. ``None`` is the model's own, for a class 1.

    Raises:
        UserError: there is no such class and no such folder, or a shift is given that would not be used.
    """
    folder = Path(resolve_model(name))
    if (folder / "scheduler").is_dir():
        config = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")
        fixed = {} if shift is None else {"use_dynamic_shifting": False, "shift": shift}
        if fixed and not config.get("use_dynamic_shifting"):
            raise UserError(f"--shift is not for {name}, whose scheduler has its own")
        return make_scheduler(config["_class_name"], {**config, **fixed})
    flow = {"num_train_timesteps": 1000, "shift": shift or 1.0}
    if name.startswith("FlowMatch"):
        return make_scheduler(name, flow)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    made = make_scheduler(name, {**schedule, "num_train_timesteps": 1000})
    if shift is None:
        return made
    if not takes_flow_sigmas(type(made)):
        raise UserError(f"--shift is of flow schedulers; {name} is none")
    return type(made)(
        num_train_timesteps=1000, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )


def explain_partition(
    partition: Partition, scheduler_name: str, num_inference_steps: int, shift: float | None
) -> Group:
    """One row per interval: t, sigma, log-SNR, training mass, inference steps.

    Raises:
        UserError: the partition does not end at t = 1000, or see `load_scheduler`.
    """
    if partition.num_train_timesteps != 1000:
        raise UserError(f"boundaries must end at t = 1000; got {partition.num_train_timesteps:g}")
    scheduler = load_scheduler(scheduler_name, shift)
    timesteps = inference_timesteps(scheduler, num_inference_steps)
    steps = steps_per_interval(partition, timesteps)
    masses = mass_per_interval(partition, _density(scheduler))
    table = Table(
        "expert",
        "t",
        "sigma",
        "log-SNR",
        "training mass",
        f"steps of {num_inference_steps} (their t)",
        title=f"{type(scheduler).__name__}; step 0 is the noisiest",
    )
    for index, interval in enumerate(partition.intervals):
        shown = ", ".join(f"{step} ({timesteps[step]:g})" for step in steps[index])
        table.add_row(
            str(index),
            _plain(str(interval)),
            _range(sigma_of(interval.lo, scheduler), sigma_of(interval.hi, scheduler)),
            _range(log_snr_of(interval.lo, scheduler), log_snr_of(interval.hi, scheduler)),
            f"{masses[index]:.1%}",
            shown or "none: this expert is never used",
        )
    return Group(table)


def explain_interval(interval: Interval, scheduler_name: str, num_inference_steps: int, shift: float | None) -> Group:
    """The interval's row, and how other trainers would be told the same.

    Raises:
        UserError: the interval reaches beyond the schedule.
    """
    if interval.hi > 1000:
        raise UserError(f"the interval {interval} reaches beyond t = 1000")
    boundaries = tuple(sorted({0.0, interval.lo, interval.hi, 1000.0}))
    group = explain_partition(Partition(boundaries), scheduler_name, num_inference_steps, shift)
    scheduler = load_scheduler(scheduler_name, shift)
    words = Table("trainer", "setting", title=f"{_plain(str(interval))} elsewhere")
    for trainer, setting in _elsewhere(interval, flow_shift(scheduler) if is_flow(scheduler) else 1.0):
        words.add_row(trainer, setting)
    return Group(*group.renderables, words)


def _elsewhere(interval: Interval, shift: float) -> list[tuple[str, str]]:
    lo, hi = interval.lo / 1000, interval.hi / 1000
    before_lo, before_hi = (value / (shift - (shift - 1) * value) for value in (lo, hi))
    return [
        ("kohya sd-scripts", f"--min_timestep {interval.lo:g} --max_timestep {interval.hi:g}"),
        (
            "musubi-tuner",
            f"--min_timestep {interval.lo:g} --max_timestep {interval.hi:g} --preserve_distribution_shape",
        ),
        ("diffusion-pipe", f"min_t = {lo:g}, max_t = {hi:g} (after the shift)"),
        ("OneTrainer", f"min_noising_strength {before_lo:.4g}, max {before_hi:.4g} (before the shift)"),
        (
            "DiffSynth-Studio",
            f"--min_timestep_boundary {1 - before_hi:.4g} --max_timestep_boundary {1 - before_lo:.4g}"
            " (share of the shifted schedule, 0 is the noisiest)",
        ),
        ("Wan 2.2 boundary_ratio", f"{lo:g} where this is the high-noise expert, {hi:g} where it is the low-noise one"),
    ]


def _density(scheduler: Any) -> TimestepDensity:
    return LogitNormalDensity(shift=flow_shift(scheduler)) if is_flow(scheduler) else UniformDensity()


def _range(start: Any, end: Any) -> str:
    return f"{float(start):.3g} to {float(end):.3g}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
