"""How much a sample's denoising loss counts, by its noise level."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from timestep_experts.errors import UserError

SnrWeighting: TypeAlias = Literal["none", "snr_plus_one", "truncated", "min_snr", "p2"]
SNR_WEIGHTINGS: tuple[SnrWeighting, ...] = get_args(SnrWeighting)

MIN_SNR_GAMMA = 5.0
_LEAST_SNR = 1e-20


def noise_loss_weight(weighting: SnrWeighting, snr: Tensor) -> Tensor:
    """The factor on the squared error of predicted noise, which is SNR times that of the clean sample.

    ``snr_plus_one`` (SNR + 1) / SNR and ``truncated`` max(SNR, 1) / SNR (Salimans & Ho, arXiv 2202.00512, section 4);
    ``min_snr`` min(SNR, 5) / SNR (Hang et al., arXiv 2303.09556, gamma = 5); ``p2`` 1 / (1 + SNR) (Choi et al.,
    arXiv 2204.00227, k = gamma = 1); ``none`` 1.

    Args:
        weighting: which.
        snr: signal-to-noise ratios, a / (1 - a) with a = alphas_cumprod; any shape. Ratios below 1e-20 count as that.

    Returns:
        float64, of the same shape.

    Raises:
        UserError: there is no such weighting.
    """
    snr = snr.double().clamp(min=_LEAST_SNR)
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "snr_plus_one":
        return (snr + 1) / snr
    if weighting == "truncated":
        return snr.clamp(min=1) / snr
    if weighting == "min_snr":
        return snr.clamp(max=MIN_SNR_GAMMA) / snr
    if weighting == "p2":
        return 1 / (1 + snr)
    raise UserError(f"unknown weighting {weighting!r}: allowed are {', '.join(SNR_WEIGHTINGS)}")


def loss_weight(weighting: SnrWeighting, snr: Tensor, error_ratio: Tensor) -> Tensor:
    """`noise_loss_weight` for any target: the same pull on the denoiser, whatever it predicts.

    A prediction implies one of the noise, whose error is the target's divided by ``error_ratio``; so the factor is
    divided by its square. ``none`` stays 1: it is the base's own loss.

    Args:
        weighting: which.
        snr: signal-to-noise ratios, any shape.
        error_ratio: error of the target over the implied error of the noise at a given noisy sample, the same shape: 1
            for noise, 1 / sqrt(a) for velocity, 1 / (1 - sigma) for flow.

    Returns:
        float64, of the same shape.

    Raises:
        UserError: there is no such weighting.
    """
    weights = noise_loss_weight(weighting, snr)
    return weights if weighting == "none" else weights / error_ratio.double().square()


def uncertainty_weighted(losses: Tensor, log_variances: Tensor) -> Tensor:
    """``exp(-s) L + s`` with a learned log-variance s: twice the loss of Kendall et al. (arXiv 1705.07115, eq. 7).

    At s = 0 it is L; for a fixed L it is least at s = ln L.

    Args:
        losses: ``(B,)``.
        log_variances: ``(B,)``, of each sample's range of timesteps.
    """
    return losses * torch.exp(-log_variances) + log_variances
