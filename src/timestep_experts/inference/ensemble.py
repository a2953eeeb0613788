"""Experts before they are merged, on a diffusers pipeline: at every step the one that owns t (DeMe, 3.3)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.experts import StoredProjections, read_projections
from timestep_experts.inference.attach import denoiser_of
from timestep_experts.intervals import Partition
from timestep_experts.merging import Projections
from timestep_experts.mixture import timestep_input_of
from timestep_experts.models import SECOND_DENOISERS

Resident = Literal["one", "all"]
_ATTRIBUTE = "_timestep_experts_ensemble"
_NUM_SHOWN = 3


class Ensemble:
    """Puts the expert that owns t into a denoiser, call by call; made by `attach_ensemble`.

    The denoiser runs once per call, as without experts. The owner is that of the timestep which the call is given, so
    schedulers, numbers of steps and starts in the middle (img2img) may be any.

    Args:
        denoiser: a diffusers model.
        experts: folders of its experts' weights, from low to high noise.
        partition: their ranges.
        resident: ``one`` keeps one expert's weights in the denoiser and reads the next from its folder, tensor by
            tensor, when the range changes; ``all`` keeps all on the denoiser's device.

    Attributes:
        active: the index of the expert in the denoiser; ``None`` before the first call.
        num_swaps: how often an expert was put into it.

    Raises:
        UserError: see `attach_ensemble`.
    """

    def __init__(self, denoiser: nn.Module, experts: Sequence[Path], partition: Partition, resident: Resident) -> None:
        self.denoiser, self.partition, self.resident = denoiser, partition, resident
        self.active: int | None = None
        self.num_swaps = 0
        self._targets: dict[str, Tensor] = denoiser.state_dict(keep_vars=True)
        self._sources = [_Source(Checkpoint(folder), read_projections(folder)) for folder in experts]
        for source in self._sources:
            _check_fit(self._targets, source.weights, denoiser)
        if resident == "all":
            self._base = {name: tensor.data for name, tensor in self._targets.items()}
            self._loaded = [{n: s.weights.get(n).to(t) for n, t in self._targets.items()} for s in self._sources]
        else:
            self._base = {name: tensor.detach().cpu().clone() for name, tensor in self._targets.items()}
        self._is_changed = False
        self._projections = _attach_projections(denoiser, self._sources)
        self._timestep = timestep_input_of(denoiser)
        self._position = list(inspect.signature(denoiser.forward).parameters).index(self._timestep.argument)
        self._handle = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        setattr(denoiser, _ATTRIBUTE, self)

    def detach(self) -> None:
        """Give the denoiser its own weights back, to the byte.

        Raises:
            UserError: it was detached already.
        """
        if getattr(self.denoiser, _ATTRIBUTE, None) is not self:
            raise UserError("this ensemble is not attached")
        self._handle.remove()
        if self._projections is not None:
            self._projections.detach_hooks()
        if self._is_changed:
            for name in self._targets:
                self._put(name, self._base)
        delattr(self.denoiser, _ATTRIBUTE)

    def use(self, index: int) -> None:
        """Put an expert into the denoiser, unless it is there."""
        if index == self.active:
            return
        source = self._sources[index]
        self.active, self._is_changed = None, True  # should reading fail half-way
        for name in self._targets:
            if self.resident == "all":
                self._put(name, self._loaded[index])
            else:
                self._put(name, {name: source.weights.get(name)})
        if self._projections is not None and source.projections is not None:
            for name, delta in self._projections.named_deltas().items():
                delta.data.copy_(source.projections.deltas[name])
        self.active = index
        self.num_swaps += 1

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        target, tensor = self._targets[name], tensors[name]
        if self.resident == "all":
            target.data = tensor.to(target.device)
        else:
            target.data.copy_(tensor)

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._timestep.argument
        t = self._timestep.t_of(torch.as_tensor(kwargs[name] if name in kwargs else args[self._position]).float())
        owners = sorted(set(self.partition.index_of(t).flatten().tolist()))
        if len(owners) != 1:
            raise UserError(
                f"one call of the denoiser with timesteps of the ranges {', '.join(map(str, owners))}: an ensemble has"
                " one expert in it at a time, so all samples of a call must share a range"
            )
        self.use(owners[0])


class _Source:
    """One expert's files."""

    def __init__(self, weights: Checkpoint, projections: StoredProjections | None) -> None:
        self.weights, self.projections = weights, projections


def attach_ensemble(
    pipeline: Any, experts: Sequence[Path | str], partition: Partition, resident: str = "one"
) -> Ensemble:
    """Make a pipeline use, at every step, the expert that owns its timestep. It is then used as always.

    Args:
        pipeline: a diffusers pipeline with one denoiser, whose dtype and device hold.
        experts: folders of fine-tuned copies of that denoiser, from low to high noise, as `decouple` writes them.
        partition: their ranges, which end at the T of the pipeline's scheduler; the last one owns t = T.
        resident: ``one`` or ``all`` of them are in memory; see `Ensemble`. With ``one``, a copy of the pipeline's own
            weights is kept on the CPU.

    Returns:
        The ensemble: its ``detach`` gives the pipeline back as it was.

    Raises:
        UserError: the experts do not fit the pipeline or the ranges; the pipeline stays as it was.
    """
    denoiser = denoiser_of(pipeline)
    known: Resident | None = next((kind for kind in get_args(Resident) if kind == resident), None)
    if known is None:
        raise UserError(f"unknown resident {resident!r}: allowed are {', '.join(get_args(Resident))}")
    if any(isinstance(getattr(pipeline, name, None), nn.Module) for name in SECOND_DENOISERS):
        raise UserError(f"a {type(pipeline).__name__} with two denoisers takes no ensemble; it takes one denoiser")
    if hasattr(denoiser, _ATTRIBUTE):
        raise UserError(f"the {type(denoiser).__name__} of this pipeline carries an ensemble already; detach it first")
    if len(experts) != len(partition):
        raise UserError(f"there are {len(experts)} experts for {len(partition)} ranges")
    total = pipeline.scheduler.config["num_train_timesteps"]
    if partition.num_train_timesteps != total:
        raise UserError(f"the ranges end at {partition.num_train_timesteps:g}; this pipeline has {total} timesteps")
    return Ensemble(denoiser, [Path(expert) for expert in experts], partition, known)


def attach_projections(pipeline: Any, folder: Path | str) -> Projections | None:
    """Put those projections of a merged model on its pipeline that are not in its weights.

    Args:
        pipeline: loaded from the merged folder.
        folder: of the denoiser, with ``projection.safetensors``.

    Returns:
        Their ``detach_hooks`` takes them off; ``None`` if all are in the weights.

    Raises:
        UserError: the file cannot be read, or is of another denoiser.
    """
    stored, denoiser = read_projections(Path(folder)), denoiser_of(pipeline)
    if stored is None or not stored.kept:
        return None
    missing = [place.module for place in stored.kept if place.module not in dict(denoiser.named_modules())]
    if missing:
        raise UserError(f"{folder} has projections of another denoiser: this one has no {', '.join(missing)}")
    projections = Projections(denoiser, list(stored.kept))
    for name, delta in projections.named_deltas().items():
        delta.requires_grad_(False).copy_(stored.deltas[name])
    return projections


def _attach_projections(denoiser: nn.Module, sources: Sequence[_Source]) -> Projections | None:
    """Those that are not in the experts' weights."""
    kept = [() if source.projections is None else source.projections.kept for source in sources]
    if any(places != kept[0] for places in kept):
        raise UserError("the experts of an ensemble have projections at different places")
    return Projections(denoiser, list(kept[0])) if kept[0] else None


def _check_fit(targets: Mapping[str, Tensor], weights: Checkpoint, denoiser: nn.Module) -> None:
    wrong = sorted(targets.keys() ^ weights.tensors.keys()) or sorted(
        name for name, tensor in targets.items() if tuple(tensor.shape) != weights.tensors[name].shape
    )
    if wrong:
        shown = ", ".join(wrong[:_NUM_SHOWN]) + (", ..." if len(wrong) > _NUM_SHOWN else "")
        raise UserError(
            f"{weights.path} is no expert of this {type(denoiser).__name__}: {len(wrong)} tensors differ in name or"
            f" shape: {shown}"
        )
