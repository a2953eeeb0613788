"""A x and the average of x together, with one product for the gradient of both.

Shapes: B rows of a batch, N positions, k features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timestep_experts.mixture.fast.products import flat, project
from timestep_experts.mixture.plain import mean_pool


def down_project_and_pool(
    x: Tensor, down: Tensor, average: Tensor | None, is_convolution: bool
) -> tuple[Tensor, Tensor | None]:
    """A x, and the average of x with a gradient.

    Args:
        x: the input; a convolution's must be pointwise.
        down: A of every row, ``(B, R, k)``.
        average: the value of the average ``(B, k)``; ``None`` where nobody needs it.
        is_convolution: whether features come second.

    Returns:
        A x, ``(B, N, R)``, or ``(B, R, N)`` of a convolution; and the average.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, down = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, down))
    read: tuple[Tensor, Tensor | None] = DownProjectAndPool.apply(x, down, average, is_convolution)  # type: ignore[no-untyped-call]
    return read


class DownProjectAndPool(torch.autograd.Function):
    """A x and the average of x, whose gradients reach x by one product.

    Left to autograd, the average's gradient would be written out for every position and added to the other one, and the
    gradient of A would come from a product with few columns. Together that is as much work as all else that experts do.
    """

    @staticmethod
    def forward(x: Tensor, down: Tensor, average: Tensor | None, is_convolution: bool) -> tuple[Tensor, Tensor | None]:
        """See `down_project_and_pool`."""
        return project(x, down, is_convolution), None if average is None else average.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 - torch passes it
        """Keep what autograd would have kept."""
        x, down, average, ctx.is_convolution = inputs
        ctx.has_average = average is not None
        ctx.save_for_backward(x, down)
        ctx.save_for_forward(x, down)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor, d_average: Tensor | None) -> tuple[Tensor | None, ...]:
        """``dx = d_hidden A + d_average / N`` and ``dA = d_hidden^T x``."""
        x, down = ctx.saved_tensors
        z = flat(x, ctx.is_convolution)
        dx = d_down = None
        if ctx.needs_input_grad[0]:
            first, second = (down.transpose(1, 2), d_hidden) if ctx.is_convolution else (d_hidden, down)
            if d_average is None:
                dx = torch.bmm(first, second)
            else:
                positions = 2 if ctx.is_convolution else 1
                share = (d_average / z.shape[positions]).to(z.dtype).unsqueeze(positions)
                dx = torch.baddbmm(share.expand_as(z), first, second)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            first, second = (d_hidden, z.transpose(1, 2)) if ctx.is_convolution else (d_hidden.transpose(1, 2), z)
            d_down = torch.bmm(first, second)
        return dx, d_down, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, down_t: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        """The change along changes of x and A, for forward-mode differentiation."""
        x, down = ctx.saved_tensors
        hidden_t = project(x_t, down, ctx.is_convolution) + project(x, down_t, ctx.is_convolution)
        return hidden_t, mean_pool(x_t, ctx.is_convolution) if ctx.has_average else None
