"""What each trick of the fast arithmetic is worth: a routed mixture without it, beside one with all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

import torch
from rich.console import Console
from torch import nn

from speed_cases import Case, convolution, denoiser_cases, layer_cases, linear, passes_of
from speed_passes import Findings, Setting, build, measure
from speed_variants import BASE, Form, Maker, Pass, Variant, make_route
from speed_world import draw
from timestep_experts.mixture import PlainKernels
from timestep_experts.mixture.fast import FastKernels, Tricks
from timestep_experts.mixture.kernels import Kernels

ALL, PLAIN = "all tricks", "plain arithmetic"
TRICKS = tuple(item.name for item in fields(Tricks))


def make_with(
    make_kernels: partial[Kernels], model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]
) -> Variant:
    """A routed mixture with its own arithmetic."""
    return make_route(model, targets, form, kind, ts, kernels=make_kernels())


def variants() -> dict[str, Maker]:
    """The mixture with all tricks first, for it is what the others are divided by."""
    kernels: Mapping[str, partial[Kernels]] = {
        BASE: partial(FastKernels),
        **{f"without {name}": partial(FastKernels, Tricks(**{name: False})) for name in TRICKS},
        PLAIN: partial(PlainKernels),
    }
    return {name: partial(make_with, made) for name, made in kernels.items()}


def tricks(setting: Setting, form: Form, pattern: re.Pattern[str], *, quick: bool, console: Console) -> Findings:
    """See `compare`."""
    return compare(variants(), ALL, setting, replace(form, num_contexts=1), pattern, quick=quick, console=console)


def comparison_cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Layers, and a whole UNet."""
    layers = layer_cases(device, quick=True) if quick else _layers()
    return [*layers, *denoiser_cases(device, quick=quick)[:1]]


def compare(
    makers: Mapping[str, Maker],
    first: str,
    setting: Setting,
    form: Form,
    pattern: re.Pattern[str],
    *,
    quick: bool,
    console: Console,
) -> Findings:
    """Variants beside one of them: layers under every pass, and eager also a whole UNet and the embedded world.

    Args:
        makers: the one that others are divided by stands first, under the name of the base.
        first: what it is called in the table.
        setting: device, dtype and time.
        form: of what is attached.
        pattern: of the cases and passes that are meant; the world is called "world".
        quick: tiny sizes.
        console: for the status.
    """
    setting = replace(setting, memory=False)
    findings = Findings()
    cases = comparison_cases(setting.device, quick=quick)
    for case in cases[:-1] if setting.compiled else cases:
        if not (passes := passes_of(case, pattern)):
            continue
        base = build(case, setting)
        for kind in passes:
            with console.status(f"{case.name}, {kind}{', compiled' if setting.compiled else ''}"):
                findings.rows += measure(case, base, kind, makers, form, setting).rows
    if not setting.compiled and pattern.search("world"):
        findings.rows += draw(setting, form, quick=quick, makers=makers).rows
    for row in findings.rows:
        row["variant"] = first if row["variant"] == BASE else row["variant"]
    return findings


def _layers() -> list[Case]:
    return [
        linear("SD1.5", 640, 1024, (2, 8)),
        convolution("SD1.5", 320, 32, 3, (2, 8)),
        convolution("SD1.5", 640, 32, 1, (2, 8)),
    ]
