"""What gates per rank cost beside a LoRA of the same rank, in the same mixture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from speed_passes import Findings, Setting
from speed_tricks import compare
from speed_variants import BASE, PEFT, Form, Maker, Pass, Variant, attach, make_peft, twin_of, variant_of
from timestep_experts.intervals import Partition
from timestep_experts.mixture import MixtureSpec, RouterForm, Scale
from timestep_experts.mixture.fast import FastKernels, Tricks

LORA, RANK = "one LoRA", 32
FORMS = {
    "gates of t": RouterForm("rank", "t", knots=9, unit_rms=True),
    "gates on intervals": RouterForm("rank", "t", intervals=Partition.uniform(8), unit_rms=True),
    "gates of t and latents": RouterForm("rank", "z_and_t", "latent_rms", knots=9, unit_rms=True),
}


WITHOUT = {"gates of t, table by table": Tricks(joined_tables=False)}


def make_gates(router: RouterForm | None, tricks: Tricks | None = None) -> Maker:
    """One LoRA with gates of some form on its ranks, or without any."""

    def make(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
        twin = twin_of(model)
        is_gated = router is not None
        scale = Scale("n1", Partition.uniform(1), form.rank, form.rank, gated=is_gated, base_gate=float(is_gated))
        mixture = attach(twin, targets, MixtureSpec((scale,), router or RouterForm()), FastKernels(tricks or Tricks()))
        mixture.mode = "route" if is_gated else "switch"
        return variant_of(twin, mixture)

    return make


def variants() -> dict[str, Maker]:
    """The LoRA first, for it is what the others are divided by."""
    gated = {name: make_gates(router) for name, router in FORMS.items()}
    without = {name: make_gates(FORMS["gates of t"], tricks) for name, tricks in WITHOUT.items()}
    return {BASE: make_gates(None), PEFT: make_peft, **gated, **without}


def gates(setting: Setting, form: Form, pattern: re.Pattern[str], *, quick: bool, console: Console) -> Findings:
    """See `compare`."""
    torch.manual_seed(0)
    return compare(variants(), LORA, setting, replace(form, rank=RANK), pattern, quick=quick, console=console)
