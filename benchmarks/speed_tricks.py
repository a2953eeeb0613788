"""What each trick of the fast arithmetic is worth: a routed mixture without it, beside one with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

from rich.console import Console
from torch import nn

from speed_cases import Case, convolution, denoiser_cases, layer_cases, linear
from speed_passes import Findings, Setting, build, measure
from speed_variants import BASE, PASSES, Form, Maker, Pass, Variant, make_route
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


def tricks(setting: Setting, form: Form, *, quick: bool, console: Console) -> Findings:
    """Layers under every pass, and eager also a whole UNet and the embedded world."""
    return compare(variants(), ALL, setting, replace(form, num_contexts=1), quick=quick, console=console)


def compare(
    makers: Mapping[str, Maker], first: str, setting: Setting, form: Form, *, quick: bool, console: Console
) -> Findings:
    """Variants beside one of them.

    Args:
        makers: the one that others are divided by stands first, under the name of the base.
        first: what it is called in the table.
        setting: device, dtype and time.
        form: of what is attached.
        quick: tiny sizes.
        console: for the status.
    """
    setting = replace(setting, memory=False)
    findings = Findings()
    cases = layer_cases(setting.device, quick=True) if quick else _layers()
    cases += [] if setting.compiled else denoiser_cases(setting.device, quick=quick)[:1]
    for case in cases:
        base = build(case, setting)
        for kind in PASSES:
            with console.status(f"{case.name}, {kind}{', compiled' if setting.compiled else ''}"):
                findings.rows += measure(case, base, kind, makers, form, setting).rows
    if not setting.compiled:
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
