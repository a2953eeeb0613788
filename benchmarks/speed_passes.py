"""One case under one pass: make the variants, warm them up, time them in turn, and take their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from speed_cases import Case, OneLayer
from speed_timing import Budget, Job, Stopwatch, Timing, interleave, peak_bytes
from speed_variants import BASE, ONE_T, TRAINING, Form, Maker, Pass, UnavailableError, Variant, make_adapters
from timestep_experts.intervals import Partition

NUM_TIMESTEPS = 1000
COMPILES_ANEW = "the network is compiled anew for each adapter: measured on single layers alone"


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure.

    Args:
        device: of networks and inputs.
        dtype: of both, adapters included; routers stay fp32.
        budget: of one pass of one case.
        compiled: by torch.compile, on a GPU with CUDA graphs.
        memory: whether to take the peak of memory too; of eager calls alone.
    """

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    compiled: bool = False
    memory: bool = True


@dataclass
class Findings:
    """Rows of numbers, and what was left out and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """A variant with its input, ready to be called at a t.

    Args:
        variant: to be called.
        network: its model, or that compiled.
        sample: the input, with a gradient while training.
        conditions: further arguments.
        ts: the mixed timesteps, on the device; ``None`` where all samples have the t of the call.
        shared: a tensor for each t of the call.
        training: forward and backward.
        uses_graphs: whether the outputs of the call before may be overwritten.
    """

    variant: Variant
    network: Callable[..., Any]
    sample: Tensor
    conditions: Mapping[str, Any]
    ts: Tensor | None
    shared: Mapping[float, Tensor]
    training: bool
    uses_graphs: bool

    def run(self, t: float) -> None:
        """One call; gradients are dropped afterwards."""
        if self.uses_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.ts is None:
            self.variant.before(t)
        timestep = self.shared[t] if self.ts is None else self.ts
        with torch.set_grad_enabled(self.training):
            output = self.network(self.sample, timestep=timestep, **self.conditions)[0]
        if self.training:
            output.backward(torch.ones_like(output))
            for leaf in (self.sample, *self.variant.trained):
                leaf.grad = None


def middles(num_intervals: int) -> list[float]:
    """A t in every interval, from noise to picture."""
    return [(interval.lo + interval.hi) / 2 for interval in Partition.uniform(num_intervals).intervals][::-1]


def build(case: Case, setting: Setting) -> nn.Module:
    """The base of a case: frozen, in evaluation mode."""
    torch.manual_seed(0)
    with setting.device:
        network = case.make()
    return network.to(setting.dtype).requires_grad_(False).eval()


def measure(
    case: Case, base: nn.Module, kind: Pass, makers: Mapping[str, Maker], form: Form, setting: Setting
) -> Findings:
    """The rows of one case under one pass."""
    findings = Findings()
    about = {"case": case.name, "pass": kind, "compiled": setting.compiled}
    calls: dict[str, Call] = {}
    graphs: dict[str, int] = {}
    with compiler_at_rest() if setting.compiled else nullcontext():
        for name, make in makers.items():
            try:
                call = prepare(case, base, kind, make, form, setting)
                graphs[name] = _warm_up(call, middles(form.num_experts), setting)
            except UnavailableError as error:
                findings.skipped.append({**about, "variant": name, "reason": str(error)})
                continue
            calls[name] = call
        jobs = {name: Job(call.run, call.variant.settles) for name, call in calls.items()}
        timings = interleave(jobs, BASE, Stopwatch(setting.device), middles(form.num_experts), setting.budget)
    sizes = _sizes(calls, base, setting)
    batch = case.batches[kind != ONE_T]
    for name, timing in timings.items():
        more = {"graphs": graphs[name]} if setting.compiled else sizes.get(name, {})
        findings.rows.append({**about, "variant": name, "batch": batch, **row_of(timing), **more})
    return findings


def row_of(timing: Timing) -> dict[str, Any]:
    """As JSON."""
    return {**asdict(timing), "quartiles": list(timing.quartiles)}


def compile_network(network: nn.Module, device: torch.device) -> Callable[..., Any]:
    """By torch.compile for fixed shapes, on a GPU with CUDA graphs."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    compiled: Callable[..., Any] = torch.compile(network, mode=mode, dynamic=False)
    return compiled


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here; empty if it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"torch.compile fails: {type(error).__name__}: {lines[0] if lines else 'no message'}"
    return ""


@contextmanager
def compiler_at_rest() -> Iterator[None]:
    """Forget what was compiled before, and let every variant of a network have graphs of its own."""
    torch.compiler.reset()
    config: Any = torch._dynamo.config  # noqa: SLF001 - torch's own documentation sets it so
    names = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
    with config.patch({name: 1024 for name in names if hasattr(config, name)}):
        yield
    torch.compiler.reset()


def num_graphs() -> int:
    """Graphs compiled since the process began."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # noqa: SLF001


def prepare(case: Case, base: nn.Module, kind: Pass, make: Maker, form: Form, setting: Setting) -> Call:
    """A variant with the input of a pass; not yet warm.

    Raises:
        UnavailableError: it cannot do this pass.
    """
    if setting.compiled and make is make_adapters and kind == ONE_T and not isinstance(base, OneLayer):
        raise UnavailableError(COMPILES_ANEW)
    batch = case.batches[kind != ONE_T]
    mixed = [(i + 0.5) * NUM_TIMESTEPS / batch for i in range(batch)]
    variant = make(base, case.targets, form, kind, mixed)
    torch.manual_seed(1)
    conditions = {key: moved_to(setting, value) for key, value in case.conditions(batch).items()}
    sample = torch.randn(batch, *case.shape).to(setting.device, setting.dtype)
    shared = {t: torch.tensor([t], device=setting.device) for t in middles(form.num_experts)}
    if case.expands_t:
        shared = {t: value.expand(batch) for t, value in shared.items()}
    return Call(
        variant,
        compile_network(variant.model, setting.device) if setting.compiled else variant.model,
        sample.requires_grad_(kind == TRAINING),
        conditions,
        None if kind == ONE_T else torch.tensor(mixed, device=setting.device),
        shared,
        kind == TRAINING,
        setting.compiled and setting.device.type == "cuda",
    )


def moved_to(setting: Setting, value: Any) -> Any:
    """A tensor in the setting's device and dtype; anything else as it is."""
    return value.to(setting.device, setting.dtype) if isinstance(value, Tensor) else value


def _warm_up(call: Call, ts: Sequence[float], setting: Setting) -> int:
    """Call it until nothing is made for the first time; the number of graphs compiled for it."""
    before = num_graphs() if setting.compiled else 0
    for t in ts if setting.compiled and call.ts is None else ts[:1]:
        for _ in range(3 if call.uses_graphs else 1):  # a CUDA graph is recorded at the second call
            try:
                call.run(t)
            except RuntimeError as error:
                if not setting.compiled:
                    raise
                raise UnavailableError(f"not compiled: {type(error).__name__}: {str(error)[:200]}") from error
    return num_graphs() - before if setting.compiled else 0


def _sizes(calls: Mapping[str, Call], base: nn.Module, setting: Setting) -> dict[str, dict[str, Any]]:
    """Weights beside the base's, the peak of a call, and both with the base's weights, as a ratio to the base's."""
    if setting.compiled or not setting.memory:
        return {}
    weights = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    t = next(iter(calls[BASE].shared))
    peaks = peak_bytes({name: partial(call.run, t) for name, call in calls.items()}, setting.device)
    found = {}
    for name, call in calls.items():
        extra = call.variant.extra_bytes(base)
        ratio = (weights + extra + peaks[name]) / (weights + peaks[BASE])
        found[name] = {"extra_weight_bytes": extra, "peak_bytes": peaks[name], "memory_ratio": ratio}
    return found
