"""How long it takes until experts can be used: put on a network in memory, loaded from a folder, fused in."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from speed_cases import Case
from speed_passes import Findings, Setting, build, moved_to
from speed_timing import Stopwatch
from speed_variants import BASE, FUSED, FUSED_IN, PEFT, ROUTE, Form
from speed_world import load
from timestep_experts.formats import Bundle, save_bundle
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.mixture.fast.fusing import FusedExperts, Held

ATTACH, LOAD, EXCHANGE, STEP = "attach", "load", "fuse another expert in", "one step"
Jobs = dict[tuple[str, str], tuple[Callable[[], object], Callable[[], object]]]
"""By what and by variant: what is timed, and what undoes it."""

MOST_LONG_ROUNDS = 5  # of what may take as long as a step


def start(case: Case, setting: Setting, form: Form) -> Findings:
    """Rows for a mixture of eight experts, a context and its router, and for one LoRA.

    What is in the weights is exchanged between two experts, or between two LoRAs by diffusers; a step is one call of
    the bare network.

    Args:
        case: a denoiser of Stable Diffusion's kind.
        setting: device, dtype and rounds.
        form: of the mixture.
    """
    network = build(case, setting)
    base = load(setting)
    pipeline = type(base)(**{**base.components, "unet": network}, requires_safety_checker=False)
    context = Scale("context", Partition.uniform(1), form.rank, form.rank, gated=True)
    spec = MixtureSpec((Scale("core", Partition.uniform(form.num_experts), form.rank, form.rank), context))
    config = LoraConfig(r=form.rank, lora_alpha=form.rank, target_modules=list(case.targets))
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        bundle, lora = Path(folder) / "bundle", Path(folder) / "lora"
        mixture = Mixture.attach(network, spec, list(case.targets))
        _save_mixture(mixture, network, bundle)
        mixture.detach()
        network.add_adapter(config, "saved")
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network, adapter_name="saved"))
        type(base).save_lora_weights(lora, unet_lora_layers=state)
        network.delete_adapters("saved")
        jobs: Jobs = {
            (ATTACH, ROUTE): (lambda: Mixture.attach(network, spec, list(case.targets)), lambda: detach(pipeline)),
            (ATTACH, PEFT): (lambda: network.add_adapter(config, "one"), lambda: network.delete_adapters("one")),
            (LOAD, ROUTE): (lambda: attach(pipeline, bundle), lambda: detach(pipeline)),
            (LOAD, PEFT): (lambda: pipeline.load_lora_weights(lora), pipeline.unload_lora_weights),
        }
        stopwatch, rounds = Stopwatch(setting.device), setting.budget.rounds
        seconds = _time_in_turn(jobs, stopwatch, rounds)
        few = min(rounds, MOST_LONG_ROUNDS)
        seconds |= _time_in_turn(_step(network, case, setting), stopwatch, few)
        with _switched(network, spec, case) as job:
            seconds |= _time_in_turn(job, stopwatch, few)
        with _fused(pipeline, lora) as job:
            seconds |= _time_in_turn(job, stopwatch, few)
    for (what, variant), found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        row = {"case": case.name, "pass": what, "variant": variant, "compiled": False, "rounds": len(found)}
        findings.rows.append({**row, "seconds": middle, "quartiles": [low, high]})
    return findings


def _step(network: nn.Module, case: Case, setting: Setting) -> Jobs:
    sample = torch.randn(case.batches[0], *case.shape)
    given = {"sample": sample, **case.conditions(case.batches[0]), "timestep": 500}
    moved = {key: moved_to(setting, value) for key, value in given.items()}

    @torch.no_grad()
    def step() -> None:
        network(**moved)

    return {(STEP, BASE): (step, lambda: None)}


@contextmanager
def _switched(network: nn.Module, spec: MixtureSpec, case: Case) -> Iterator[Jobs]:
    """Fold in the experts of another interval."""
    mixture = Mixture.attach(network, spec, list(case.targets))
    fused = FusedExperts(network, list(mixture.layers.values()), mixture.state)
    owners = cycle([Held((("core", 0),)), Held((("core", 1),))])
    fused.keep_weights()
    yield {(EXCHANGE, FUSED_IN): (lambda: fused.hold(next(owners)), lambda: None)}
    fused.close(network)
    mixture.detach()


@contextmanager
def _fused(pipeline: Any, lora: Path) -> Iterator[Jobs]:
    """Take one LoRA out of the weights and put another in."""
    names = ("one", "other")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
        for name in names:
            pipeline.load_lora_weights(lora, adapter_name=name)
    coming = cycle(names)
    pipeline.fuse_lora(adapter_names=[next(coming)])

    def exchange() -> None:
        pipeline.unfuse_lora()
        pipeline.fuse_lora(adapter_names=[next(coming)])

    yield {(EXCHANGE, FUSED): (exchange, lambda: None)}
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()


def _save_mixture(mixture: Mixture, network: nn.Module, folder: Path) -> None:
    names = tuple(f"unet.{name}" for name in mixture.layers)
    tensors = {f"unet.{name}": torch.randn_like(value) * 0.01 for name, value in mixture.state_dict().items()}
    save_bundle(Bundle(mixture.spec, names, tensors, "route", "random weights", type(network).__name__, {}), folder)


def _time_in_turn(jobs: Jobs, stopwatch: Stopwatch, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Each once per round, after one round that warms up; what a job did is undone before the next."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for turn in range(rounds + 1):
        for key, (run, undo) in jobs.items():
            found = stopwatch.time(run)
            undo()
            if turn:
                seconds[key].append(found)
    return seconds
