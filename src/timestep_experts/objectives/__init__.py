"""What is minimised. Needs torch only."""

from timestep_experts.objectives.denoising import squared_error
from timestep_experts.objectives.weighting import (
    SNR_WEIGHTINGS,
    SnrWeighting,
    loss_weight,
    noise_loss_weight,
    uncertainty_weighted,
)

__all__ = [
    "SNR_WEIGHTINGS",
    "SnrWeighting",
    "loss_weight",
    "noise_loss_weight",
    "squared_error",
    "uncertainty_weighted",
]
