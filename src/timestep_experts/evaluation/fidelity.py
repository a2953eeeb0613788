"""How far a set of pictures is from another, in the features of the embedded world's judge."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timestep_experts.world.judge import load_judge


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two feature sets (Heusel et al. 2017, arXiv 1706.08500).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, in float64.

    Args:
        one: ``(N, d)`` features, N at least 2.
        other: ``(M, d)`` features, M at least 2.

    Raises:
        ValueError: a set has fewer than two members, which have no covariance.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 features on each side; got {len(one)} and {len(other)}")
    one, other = one.double(), other.double()
    gap = (one.mean(0) - other.mean(0)).square().sum()
    first, second = (torch.cov(features.T).reshape(features.shape[1], -1) for features in (one, other))
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt()  # of a product of two psd matrices
    return max(0.0, float(gap + first.trace() + second.trace() - 2 * roots.sum()))  # rounding may fall below


def judge_features(pictures: NDArray[np.uint8]) -> Tensor:
    """The judge's penultimate features of ``(N, H, W, 3)`` uint8 pictures of any size: ``(N, 128)`` fp32."""
    return load_judge().features(to_judge_input(pictures))


def to_judge_input(pictures: NDArray[np.uint8]) -> Tensor:
    """``(N, H, W, 3)`` uint8 to ``(N, 3, 64, 64)`` in [-1, 1]."""
    signal = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    if signal.shape[-2:] != (64, 64):
        signal = torch.nn.functional.interpolate(signal, (64, 64), mode="bilinear", antialias=True)
    return signal
