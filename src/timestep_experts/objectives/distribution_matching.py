"""Distribution matching distillation (DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828), per sample, as pure formulas.

Notation: ``x`` is what the generator made of noise, ``z = sqrt(a_t) x + sqrt(1 - a_t) n`` the same made noisy again,
``a_t`` the cumulative product of the alphas of a DDPM-like schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def clean_from_noise(noisy: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """``x0(z, e, t) = (z - sqrt(1 - a_t) e) / sqrt(a_t)``, computed in fp64 (DMD, eq. 3; DDPM, eq. 15).

    At t = 999 of Stable Diffusion ``sqrt(a_t)`` is .068: what is lost before the division counts fifteen times.

    Args:
        noisy: ``(B, ...)``, z.
        noise: the same shape, e: what the denoiser says.
        alpha: ``(B,)``, a_t in (0, 1], best in fp64.

    Returns:
        The same shape, fp32.
    """
    a = alpha.double().reshape(-1, *(1,) * (noisy.dim() - 1))
    return ((noisy.double() - (1 - a).sqrt() * noise.double()) / a.sqrt()).float()


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``e_0 + s (e_c - e_0)``; a scale of 1 gives the conditional prediction to the bit."""
    return conditional if scale == 1 else torch.lerp(unconditional, conditional, scale)


def matching_gradient(clean: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """``g = (x_F - x_R) / mean|x - x_R|`` per sample (DMD2, eq. 1; DMD, eq. 7-8): the way from fake to real, reversed.

    Args:
        clean: ``(B, ...)``, x.
        fake: x0 of z as the fake score sees it, x_F.
        real: x0 of z as the real score sees it, x_R.

    Returns:
        The same shape, without a graph; 0 where the quotient is not finite, for then x is real to the bit.
    """
    with torch.no_grad():
        scale = (clean - real).abs().flatten(1).mean(1)
        gradient = (fake - real) / scale.reshape(-1, *(1,) * (clean.dim() - 1))
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(clean: Tensor, gradient: Tensor) -> Tensor:
    """``.5 mean (x - sg(x - g))^2`` of each sample: its gradient in x is g over the elements of a sample.

    Args:
        clean: ``(B, ...)``, x, with its graph.
        gradient: `matching_gradient`.

    Returns:
        ``(B,)`` fp32.
    """
    target = (clean - gradient).detach()
    return 0.5 * (clean.float() - target.float()).square().flatten(1).mean(1)


def generator_adversarial_loss(logits: Tensor) -> Tensor:
    """``softplus(-D(x))`` per sample (DMD2, eq. 4, non-saturating): small where x passes for real."""
    return functional.softplus(-logits.float())


def discriminator_loss(generated_logits: Tensor, real_logits: Tensor) -> Tensor:
    """``softplus(D(x)) + softplus(-D(real))`` per pair (DMD2, eq. 4); 2 ln 2 where the discriminator knows nothing."""
    return functional.softplus(generated_logits.float()) + functional.softplus(-real_logits.float())
