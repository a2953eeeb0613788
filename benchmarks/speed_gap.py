"""Where the time that experts cost goes: what a profiler sees more of than beside the bare layer."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from speed_cases import Case, convolution, linear
from speed_passes import Call, Findings, Setting, build, middles, prepare
from speed_variants import BASE, FUSED_IN, ONE_T, PASSES, PEFT, ROUTE, SWITCH, VARIANTS, Form

SHARE = 0.005  # of the base's time; what is below goes into one row
PYTHON, OTHERS = "Python, between operators", "other operators"
COMPARED = (PEFT, SWITCH, ROUTE)
ROUNDS, CALLS = 9, 5


def gap_cases(batch: int, *, quick: bool) -> list[Case]:
    """A layer in the middle of SD1.5's sizes, and one that is a convolution."""
    if quick:
        return [linear("tiny", 16, 8, (2, 3))]
    return [linear("SD1.5", 640, 1024, (2, batch)), convolution("SD1.5", 640, 32, 3, (2, batch))]


def gap(setting: Setting, form: Form, *, quick: bool) -> Findings:
    """Rows of operator, milliseconds per call, and its excess over the base's as a share of all the base's time.

    On a GPU it is the time of kernels, on the CPU that of operators without those that they call.
    """
    findings = Findings()
    for case in gap_cases(8 if setting.device.type == "cuda" else 4, quick=quick):
        base = build(case, setting)
        for kind in PASSES:
            compared = (*COMPARED, FUSED_IN) if kind == ONE_T else COMPARED
            calls = {name: prepare(case, base, kind, VARIANTS[name], form, setting) for name in (BASE, *compared)}
            spent = _in_turn(calls, middles(form.num_experts)[0], setting, 1 if quick else ROUNDS)
            whole = spent[BASE].total()
            for name in compared:
                about = {"case": case.name, "pass": kind, "variant": name, "compiled": False}
                excess = Counter({op: spent[name][op] - spent[BASE][op] for op in spent[name] | spent[BASE]})
                small = sum(more for op, more in excess.items() if abs(more) < SHARE * whole and op != PYTHON)
                shown = [(op, more) for op, more in excess.most_common() if abs(more) >= SHARE * whole or op == PYTHON]
                for op, more in (*shown, (OTHERS, small)):
                    row = {"operator": op, "milliseconds": more * 1e3, "share": more / whole}
                    findings.rows.append({**about, "batch": case.batches[kind != ONE_T], **row})
    return findings


def _in_turn(calls: Mapping[str, Call], t: float, setting: Setting, rounds: int) -> dict[str, Counter[str]]:
    """Seconds of one call by operator, the median over rounds in which each has its turn."""
    for call in calls.values():
        for _ in range(3):
            call.run(t)
    found = [{name: _profile(call, t, setting) for name, call in calls.items()} for _ in range(rounds)]
    return {name: _medians([turn[name] for turn in found]) for name in calls}


def _medians(turns: list[Counter[str]]) -> Counter[str]:
    return Counter({op: statistics.median(turn[op] for turn in turns) for op in set().union(*turns)})


def _profile(call: Call, t: float, setting: Setting) -> Counter[str]:
    """Seconds of one call by operator, the mean of a few."""
    is_cuda = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(CALLS):
            with record_function(PYTHON):
                call.run(t)
    events: list[Any] = list(profiler.key_averages())
    spent = Counter({e.key: (e.self_device_time_total if is_cuda else e.self_cpu_time_total) for e in events})
    return Counter({op: time / CALLS / 1e6 for op, time in spent.items() if time > 0})
