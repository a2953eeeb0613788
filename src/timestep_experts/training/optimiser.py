"""Optimisers by name: torch's own, and those of bitsandbytes and torchao that keep their state in few bits."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.training.checkpoint import flatten_optimiser_state
from timestep_experts.training.param_group import ParamGroup, learning_rate_factor

LIBRARIES: Mapping[str, str] = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}
"""Modules whose optimisers are named ``<library>.<class>``; a name without a library is of ``torch.optim``."""

_SHARED_TABLES = ("__bnb_optimizer_quant_state__.qmap1", "__bnb_optimizer_quant_state__.qmap2")


@dataclass(frozen=True)
class OptimiserSettings:
    """Any optimiser of ``torch.optim``, or of the `LIBRARIES`, by name.

    Args:
        name: e.g. ``AdamW``, ``bitsandbytes.AdamW8bit``, ``torchao.AdamW8bit``.
        options: its keyword arguments, but for the learning rate.
        lr_scheduler: a schedule of diffusers, e.g. ``constant``, ``constant_with_warmup``, ``linear``, ``cosine``.
        lr_warmup_steps: of the schedule.
        max_grad_norm: per parameter group; ``None`` clips nothing.
    """

    name: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=lambda: {"weight_decay": 1e-2})
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0

    def check(self, param_groups: Sequence[ParamGroup]) -> None:
        """See that the optimiser can step over such parameters, and that the schedule fits their budgets.

        Raises:
            UserError: it cannot, or it does not.
        """
        for budget in sorted({group.max_train_steps for group in param_groups}):
            if self.lr_warmup_steps >= budget:
                raise UserError(
                    f"lr_warmup_steps: a warm-up of {self.lr_warmup_steps} steps does not fit into {budget} steps"
                )
            learning_rate_factor(self.lr_scheduler, self.lr_warmup_steps, budget)(0)
        for dimensions in sorted({leaf.dim() for group in param_groups for leaf in group.leaves}):
            _state_of_one(self.name, self.options, (2,) * dimensions)

    def build(self, param_groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Build the optimiser over parameter groups.

        Raises:
            UserError: see `make_optimiser`.
        """
        return make_optimiser(self.name, self.options, [group.for_optimiser for group in param_groups])


def make_optimiser(name: str, options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """An optimiser over parameter groups with rates of their own; the fused implementation where there is one.

    Raises:
        UserError: its library is not installed, no such optimiser, or it does not take one of the options.
    """
    kind = find_optimiser(name)
    accepted = inspect.signature(kind).parameters
    given = dict.fromkeys([*options, *(key for group in groups for key in group if key != "params" and key != "lr")])
    unknown = [option for option in given if option not in accepted]
    if unknown:
        raise UserError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(accepted)}")
    chosen = dict(options)
    if "fused" in accepted:
        chosen.setdefault("fused", True)
    if "lr" in accepted:  # some ask for one even where every group has its own
        chosen["lr"] = groups[0]["lr"]
    try:
        optimiser: torch.optim.Optimizer = kind([dict(group) for group in groups], **chosen)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{name} cannot be made with {dict(options)}: {error}") from error
    return optimiser


def find_optimiser(name: str) -> Any:
    """The class of an optimiser.

    Raises:
        UserError: its library is unknown or not installed, or has no such optimiser; names the nearest ones.
    """
    library, _, own_name = name.rpartition(".")
    if library not in ("", *LIBRARIES):
        allowed = ", ".join(f"{known}.<class>" for known in LIBRARIES)
        raise UserError(f"no optimiser {name!r}: a name is a class of torch.optim, or {allowed}")
    if library and importlib.util.find_spec(library) is None:
        raise UserError(f"{name} needs {library}, which is not installed: pip install 'timestep-experts[{library}]'")
    found = optimisers_of(library).get(own_name)
    if found is not None:
        return found
    known = {f"{place}.{kind}".lstrip("."): kind for place in _installed() for kind in optimisers_of(place)}
    nearest = difflib.get_close_matches(own_name, set(known.values()), 1)
    same = sorted(full for full, kind in known.items() if kind in nearest)
    hint = f"; the nearest are {', '.join(same)}" if same else ""
    raise UserError(f"{library or 'torch.optim'} has no optimiser {own_name!r}{hint}")


def optimisers_of(library: str) -> dict[str, Any]:
    """The optimisers of an installed library by name; of ``torch.optim`` for an empty one."""
    module = importlib.import_module(LIBRARIES.get(library, "torch.optim"))
    base = torch.optim.Optimizer
    return {n: k for n, k in vars(module).items() if isinstance(k, type) and issubclass(k, base) and k is not base}


def set_learning_rate(group: dict[str, Any], learning_rate: float) -> None:
    """Change a parameter group's rate, which some optimisers keep in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate


def state_bytes(name: str, options: Mapping[str, Any], shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of an optimiser's state over fp32 leaves of these shapes.

    Each different shape takes one real step on the CPU by itself, so what an optimiser keeps in full (bitsandbytes:
    leaves of less than ``min_8bit_size`` values) counts in full.

    Raises:
        UserError: see `make_optimiser`.
    """
    counts = Counter(tuple(shape) for shape in shapes)
    return sum(count * _state_of_one(name, options, shape) for shape, count in counts.items())


def _state_of_one(name: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    leaf = torch.zeros(shape)
    leaf.grad = torch.zeros_like(leaf)
    optimiser = make_optimiser(name, options, [{"params": [leaf], "lr": 1e-4}])
    try:
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for seconds per shape
            optimiser.step()
    except Exception as error:  # optimisers raise many kinds
        raise UserError(f"{name} cannot train parameters of shape {shape} here: {error}") from error
    tensors, _ = flatten_optimiser_state(optimiser)
    return sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(_SHARED_TABLES))


def _installed() -> list[str]:
    return ["", *(library for library in LIBRARIES if importlib.util.find_spec(library) is not None)]
