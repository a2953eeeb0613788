"""The denoising loss, per sample."""

from __future__ import annotations

from torch import Tensor


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over everything but the batch, in fp32.

    Args:
        predicted: ``(B, ...)``, what the denoiser says.
        target: the same shape: noise (eps-prediction) or velocity (v-prediction).

    Returns:
        ``(B,)`` fp32.
    """
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
