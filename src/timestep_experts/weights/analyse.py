"""What can be known of timesteps and experts before anything is merged: agreement of gradients, task vectors, cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.evaluation.gradients import Gradients, GradientSettings, measure_gradients
from timestep_experts.formats import portable, tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.intervals import Interval
from timestep_experts.merging import Cut, best_cuts, task_vector
from timestep_experts.merging.boundaries import interval_costs
from timestep_experts.report.search_figures import similarity_map, task_vector_map
from timestep_experts.weights.fit import one_denoiser, require_fit
from timestep_experts.weights.inputs import MergeInput, finite_tensor
from timestep_experts.weights.measured import MeasuredBase

MOST_INTERVALS = 8


@dataclass(frozen=True)
class Proposal:
    """A way to cut the timesteps.

    Args:
        boundaries: from 0 to T, for ``experts.scales``.
        cost: of `best_cuts`; 0 where gradients agree inside all intervals.
        uniform_cost: the same of equal intervals, their boundaries moved to the nearest bins.
    """

    boundaries: tuple[float, ...]
    cost: float
    uniform_cost: float


@dataclass(frozen=True)
class TaskVectors:
    """How experts differ from their base.

    Args:
        experts: their names.
        blocks: parts of the network, in its order.
        norms: ``(experts, blocks)``, relative to the base's norm in the block.
        cosines: ``(experts, experts)`` between whole task vectors.
    """

    experts: tuple[str, ...]
    blocks: tuple[str, ...]
    norms: NDArray[np.floating]
    cosines: NDArray[np.floating]


@dataclass(frozen=True)
class Analysis:
    """What was seen.

    Args:
        gradients: at K timesteps.
        proposals: for 2 to 8 intervals.
        task_vectors: of the experts; ``None`` without any.
        path: the folder with figures and JSON.
    """

    gradients: Gradients
    proposals: tuple[Proposal, ...]
    task_vectors: TaskVectors | None
    path: Path


def analyse(
    measured: MeasuredBase, experts: Sequence[Path], output: Path, settings: GradientSettings, num_shown: int = 4
) -> Analysis:
    """Measure on validation pictures, propose boundaries, draw figures; writes a folder.

    Args:
        measured: the base, and its pictures.
        experts: fine-tuned copies of the base; may be empty.
        output: a folder to be made.
        settings: of the gradients.
        num_shown: intervals outlined in the figure of similarities.

    Raises:
        UserError: an expert does not fit the base, no parameter matches, a gradient vanishes, or the output exists.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name an output to be made")
    most = min(MOST_INTERVALS, settings.num_timesteps)
    if not 2 <= num_shown <= most:
        raise UserError(
            f"{settings.num_timesteps} timesteps can be shown cut into 2 to {most} intervals; got {num_shown}"
        )
    checkpoints = [Checkpoint(find_weights(path)) for path in experts]
    family = measured.load()
    live = one_denoiser(family).state_dict()
    _, hashed = require_fit(family, measured.source, checkpoints)
    vectors = compare_task_vectors(live, hashed, [f"expert {i}" for i in range(len(hashed))]) if hashed else None
    gradients = measure_gradients(family, measured.load_pictures(family, False), settings)
    similarity = gradients.similarity()
    proposals = propose(similarity, gradients.bins, most)
    analysis = Analysis(gradients, proposals, vectors, output)
    shown = proposals[num_shown - 2].boundaries
    figures = {"similarity": similarity_map(similarity.numpy(), gradients.bins, _intervals(shown))}
    if vectors is not None:
        figures["task_vectors"] = task_vector_map(vectors.norms, vectors.experts, vectors.blocks)
    with atomic_path(output) as draft:
        draft.mkdir()
        for name, figure in figures.items():
            figure.savefig(draft / f"{name}.png")
        record = _record(measured.source, analysis, similarity, settings, [expert.described() for expert in hashed])
        write_json(draft / "analysis.json", record)
    return analysis


def propose(similarity: Tensor, bins: Sequence[Interval], most: int) -> tuple[Proposal, ...]:
    """The best cut for 2 to ``most`` intervals, beside equal ones."""
    edges = [interval.lo for interval in bins] + [bins[-1].hi]
    costs = interval_costs(similarity)

    def proposal(cut: Cut) -> Proposal:
        n = len(cut.edges) - 1
        equal = [round(i * len(bins) / n) for i in range(n + 1)]
        uniform = sum(float(costs[a, b]) for a, b in pairwise(equal))
        return Proposal(tuple(edges[edge] for edge in cut.edges), cut.cost, uniform)

    return tuple(proposal(cut) for cut in best_cuts(similarity, most)[1:])


def as_yaml(proposal: Proposal) -> str:
    """A line for ``method.experts.scales`` of a recipe."""
    return f"boundaries: [{', '.join(f'{boundary:g}' for boundary in proposal.boundaries)}]"


def compare_task_vectors(
    base: Mapping[str, Tensor], experts: Sequence[MergeInput], names: Sequence[str]
) -> TaskVectors:
    """Norms by block and cosines of task vectors; one tensor of every expert is in memory at a time.

    Raises:
        UserError: a tensor is not finite.
    """
    blocks = tuple(dict.fromkeys(block_of(name) for name in base))
    moved = torch.zeros(len(experts), len(blocks), dtype=torch.double)
    sizes = torch.zeros(len(blocks), dtype=torch.double)
    products = torch.zeros(len(experts), len(experts), dtype=torch.double)
    for name, own in tqdm(base.items(), desc="task vectors", unit="tensor", leave=False):
        if not own.is_floating_point():
            continue
        held = own.detach().cpu()
        flat = torch.stack([task_vector(finite_tensor(e, name), held).flatten() for e in experts]).double()
        product = flat @ flat.T
        block = blocks.index(block_of(name))
        products += product
        moved[:, block] += product.diagonal()
        sizes[block] += held.double().square().sum()
    lengths = products.diagonal().sqrt().clamp(min=torch.finfo(torch.double).tiny)
    relative = (moved / sizes.clamp(min=torch.finfo(torch.double).tiny)).sqrt()
    return TaskVectors(tuple(names), blocks, relative.numpy(), (products / lengths[:, None] / lengths).numpy())


def block_of(name: str) -> str:
    """The block that a tensor belongs to: ``down_blocks.0``, or the first part of its name where no number follows."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _intervals(boundaries: Sequence[float]) -> list[Interval]:
    return [Interval(lo, hi) for lo, hi in pairwise(boundaries)]


def _record(
    source: str,
    analysis: Analysis,
    similarity: Tensor,
    settings: GradientSettings,
    experts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    gradients, vectors = analysis.gradients, analysis.task_vectors
    return {
        "format": "timestep-experts/analysis",
        "format_version": 1,
        "base": portable(source),
        "settings": asdict(settings),
        "num_parameters": gradients.num_parameters,
        "t": gradients.t,
        "bins": [[interval.lo, interval.hi] for interval in gradients.bins],
        "losses": gradients.losses,
        "gradient_norms": gradients.norms,
        "similarity": similarity.tolist(),
        "proposals": {len(p.boundaries) - 1: asdict(p) for p in analysis.proposals},
        "experts": list(experts),
        "task_vectors": None
        if vectors is None
        else {"blocks": vectors.blocks, "norms": vectors.norms.tolist(), "cosines": vectors.cosines.tolist()},
        "versions": tool_versions(),
    }
