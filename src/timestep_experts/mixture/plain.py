"""The arithmetic of a layer's experts as it stands in the paper (TSM, eq. 5), one scale after the other.

Shapes: B rows of a batch, N positions, k input and d output features, r rank; in a grouped convolution g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.kernels import Experts, Strength
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.router_form import GatePositions, TimestepIndex

_LEAST_POWER = 1e-20


class PlainKernels:
    """The definition: one scale after the other, one sum of products per step, in fp32 or wider."""

    def read_tables(self, routers: Sequence[Router], index: TimestepIndex) -> Sequence[Tensor]:
        """``E[t]`` of each router (TSM, eq. 7)."""
        return [index.read(router.table().to(index.row.device)) for router in routers]

    def gather(
        self,
        stacks: Sequence[ExpertStack],
        expert_index: Sequence[Tensor],
        num_rows: int,
        groups: int,  # noqa: ARG002 - they matter where scales are joined
    ) -> Experts:
        """Index the stacks: ``A_j[i_j]`` and ``B_j[i_j]``."""
        chosen = [stack.of(index.expand(num_rows)) for stack, index in zip(stacks, expert_index, strict=True)]
        return Experts([down for down, _ in chosen], [up for _, up in chosen])

    def read(
        self, x: Tensor, router_input: Tensor | None, experts: Experts, geometry: LayerGeometry
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """``h_j = A_j[i_j] x``, and the mean of the router's input."""
        project = _convolve if geometry.is_convolution else _project
        wide = torch.promote_types(x.dtype, torch.float32)
        hidden = [project(x.to(wide), down.to(wide), geometry) for down in experts.downs]
        return hidden, None if router_input is None else mean_pool(router_input, geometry.is_convolution)

    def by_scale(self, hidden: Sequence[Tensor], experts: Experts, geometry: LayerGeometry) -> Sequence[Tensor]:  # noqa: ARG002
        """Every h_j with its features last."""
        return [h.transpose(1, 2) for h in hidden] if geometry.is_convolution else hidden

    def add(
        self,
        base_layer: nn.Module,  # noqa: ARG002 - its output is never written over
        y: Tensor,
        hidden: Sequence[Tensor],
        experts: Experts,
        strengths: Sequence[Strength],
        geometry: LayerGeometry,
    ) -> Tensor:
        """``y + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] h_j``  (TSM, eq. 5)."""
        features, groups = (1 if geometry.is_convolution else 2), geometry.groups
        total = torch.zeros((), dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
        for h, up, strength in zip(hidden, experts.ups, strengths, strict=True):
            turned = strength.transpose(1, 2) if isinstance(strength, Tensor) and geometry.is_convolution else strength
            gated = h * turned
            by_group = torch.unflatten(gated.to(total.dtype).movedim(features, 1), 1, (groups, -1))
            up_by_group = torch.unflatten(up.to(total.dtype), 1, (groups, -1))
            total = total + torch.einsum("bgrn,bgor->bgon", by_group, up_by_group)
        return y + total.flatten(1, 2).movedim(1, features).reshape(y.shape).to(y.dtype)


def mean_pool(x: Tensor, is_convolution: bool) -> Tensor:
    """Average a layer's input over all axes but the first and the features'; ``(B, k)`` fp32.

    Args:
        x: ``(B, ..., k)``, or ``(B, k, *space)`` of a convolution.
        is_convolution: whether features come second.
    """
    positions = tuple(range(2, x.dim()) if is_convolution else range(1, x.dim() - 1))
    return x.mean(positions, dtype=torch.float32) if positions else x.float()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average ``(B, N, k)`` over the positions of ``mask (B, N)``, of which padding is left out; ``(B, k)`` fp32.

    A mask of fewer rows serves equally many rows of x, next to each other.
    """
    wide = mask.float().repeat_interleave(len(x) // len(mask), 0)
    return torch.einsum("bnk,bn->bk", x.float(), wide) / wide.sum(1, keepdim=True).clamp(min=1)


def latent_rms(latents: Tensor, mask: Tensor | None, positions: GatePositions) -> Tensor:
    """``q / mean(q) - 1``, with q the root mean square of each latent feature over positions; fp32.

    Args:
        latents: A x, ``(B, N, R)``.
        mask: ``(B, N)``, 0 where a position is padding; see `masked_mean`.
        positions: with ``token``, every position is looked at by itself.

    Returns:
        ``(B, R)``, or ``(B, N, R)`` of each position. Latents that are all 0 give 0.
    """
    power = latents.float().square()
    if positions == "sample":
        power = power.mean(1) if mask is None else masked_mean(power, mask)
    rms = power.clamp(min=_LEAST_POWER).sqrt()  # the slope of a root is infinite at 0
    return rms / rms.mean(-1, keepdim=True) - 1


def convolve(x: Tensor, down: Tensor, geometry: LayerGeometry, groups: int = 1) -> Tensor:
    """The base layer's kind of convolution, with A ``(..., r, k)`` as its kernel."""
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(geometry.kernel_size) - 1]
    kernel = down.reshape(-1, geometry.in_features, *geometry.kernel_size)
    return convolution(x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, groups)


def _project(x: Tensor, down: Tensor, _: LayerGeometry) -> Tensor:
    return torch.einsum("bnk,brk->bnr", x.reshape(len(x), -1, x.shape[-1]), down)


def _convolve(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    # One group per row, so each meets its own experts.
    hidden = convolve(x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), geometry, groups=len(x))
    return hidden.reshape(len(x), down.shape[1], -1)
