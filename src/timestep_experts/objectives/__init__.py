"""What is minimised. Needs torch only."""

from timestep_experts.objectives.denoising import squared_error
from timestep_experts.objectives.distribution_matching import (
    clean_from_noise,
    discriminator_loss,
    generator_adversarial_loss,
    guided,
    matching_gradient,
    matching_loss,
)
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
    "clean_from_noise",
    "discriminator_loss",
    "generator_adversarial_loss",
    "guided",
    "loss_weight",
    "matching_gradient",
    "matching_loss",
    "noise_loss_weight",
    "squared_error",
    "uncertainty_weighted",
]
