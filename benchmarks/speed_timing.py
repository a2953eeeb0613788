"""Interleaved timing: every variant once per round, so that a busy moment hits all of them, as ratios to the base."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

MAX_CALLS = 200
MIN_ROUNDS = 3
SHORT_SECONDS = 0.2  # a call of the base that caches matter to


@dataclass(frozen=True)
class Job:
    """Something to time.

    Args:
        run: one call at a t, with what must be done before it.
        settles: whether the first call at another t does more than the ones after it.
    """

    run: Callable[[float], None]
    settles: bool = False


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Args:
        rounds: at most.
        seconds: of all rounds of one pass; fewer rounds fit where one takes long, but never less than three.
        min_seconds: of one measurement of the base; short calls are repeated.
    """

    rounds: int
    seconds: float
    min_seconds: float = 0.02


@dataclass(frozen=True)
class Timing:
    """Over rounds, the median and quartiles of a job's time divided by the base's right before it.

    Args:
        ratio: median.
        quartiles: the lower and the upper one.
        seconds: the median of one call.
        first_seconds: the median of the first call at another t, which is not part of the above; ``None`` where calls
            take long and the first is like any other.
        rounds: how many.
        calls: per round, timed together.
    """

    ratio: float
    quartiles: tuple[float, float]
    seconds: float
    first_seconds: float | None
    rounds: int
    calls: int


class Stopwatch:
    """Seconds by the clock, or on a GPU by its events."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of a call, with all that it leaves running."""
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000


_Sample = tuple[float, float, float | None]
"""Seconds of a call, of the base's right before it, and of the call that led up to it."""


def interleave(
    jobs: Mapping[str, Job], base: str, stopwatch: Stopwatch, ts: Sequence[float], budget: Budget
) -> dict[str, Timing]:
    """Time all jobs, round after round, in an order that moves on by one; t is the same within a round.

    The base is timed anew right before each job, itself included: what else the machine does hits both, and how far
    the base is from itself says how much that was.

    Args:
        jobs: by name; warm.
        base: the name of the one that the others are divided by.
        stopwatch: of the device.
        ts: rounds take them in turn.
        budget: how long.
    """
    first = {name: stopwatch.time(partial(job.run, ts[0])) for name, job in jobs.items()}
    calls = max(1, min(MAX_CALLS, math.ceil(budget.min_seconds / max(first[base], 1e-9))))
    round_seconds = (calls + 1) * (sum(first.values()) + len(jobs) * first[base])
    rounds = min(budget.rounds, max(MIN_ROUNDS, int(budget.seconds / round_seconds)))
    names, is_short = list(jobs), first[base] < SHORT_SECONDS
    samples: dict[str, list[_Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        t = ts[turn % len(ts)]
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            bare, own = (_sample(jobs[which], t, calls, is_short, stopwatch) for which in (base, name))
            samples[name].append((own[0], bare[0], own[1]))
    return {name: _summarise(samples[name], calls) for name in names}


def _sample(job: Job, t: float, calls: int, is_short: bool, stopwatch: Stopwatch) -> tuple[float, float | None]:
    """Seconds of a call, and of the one before it where that does more: caches hold another job's data."""
    first = stopwatch.time(partial(job.run, t)) if is_short or job.settles else None
    return stopwatch.time(partial(_repeat, job, t, calls)) / calls, first


def _repeat(job: Job, t: float, calls: int) -> None:
    for _ in range(calls):
        job.run(t)


def _summarise(samples: Sequence[_Sample], calls: int) -> Timing:
    ratios = [own / bare for own, bare, _ in samples]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    firsts = [first for _, _, first in samples if first is not None]
    seconds = statistics.median(own for own, _, _ in samples)
    first = statistics.median(firsts) if firsts else None
    return Timing(statistics.median(ratios), (low, high), seconds, first, len(ratios), calls)


def peak_bytes(runs: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, int]:
    """The most that each call allocates beyond what was held before it.

    On a GPU the caching allocator's own count (max_memory_allocated), on the CPU PyTorch's allocations by
    torch.profiler; memory that kernels take for themselves is not in it.
    """
    if device.type == "cuda":
        gc.collect()
        return {name: _peak_on_gpu(run) for name, run in runs.items()}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and end otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for name, run in runs.items():
            with torch.profiler.record_function(f"run {name}"):
                run()
    events = list(profile.profiler.kineto_results.events())
    spans = {e.name().removeprefix("run "): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("run ")}
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return {name: _highest([n for at, n in changes if spans[name][0] <= at <= spans[name][1]]) for name in runs}


def _highest(changes: list[int]) -> int:
    return max(accumulate(changes, initial=0))


def _peak_on_gpu(run: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - int(before)


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Flops a second of a large matrix product, bytes a second of a copy (read and written), each the best of five."""
    side = 8192 if device.type == "cuda" else 1024
    stopwatch = Stopwatch(device)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(stopwatch.time(lambda: torch.mm(matrix, matrix)) for _ in range(5))
    copied = min(stopwatch.time(lambda: target.copy_(source)) for _ in range(5))
    return 2 * side**3 / product, 2 * source.numel() / copied
