"""Averages of layers' inputs that many routers share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from timestep_experts.mixture.plain import mean_pool


class PooledInputs:
    """Averages over positions of layers' inputs, ``(B, k)`` fp32, kept for as long as the input itself lives.

    Queries, keys and values read one tensor, and all cross-attentions read the prompt. Each tensor is averaged once,
    and a prompt once for all steps. A tensor that was overwritten in place is averaged anew, and an average through
    which gradients flow is never kept.
    """

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[PooledInputs], tuple[()]]:
        """A copy starts empty."""
        return PooledInputs, ()

    def of(self, x: Tensor, *, is_convolution: bool) -> Tensor:
        """Average x as `mean_pool` does."""
        # The compiler shares equal sums by itself, and a captured graph must contain its own sum.
        is_recorded = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        has_gradients = x.requires_grad and torch.is_grad_enabled()
        if is_recorded or has_gradients or x.is_inference():  # inference tensors do not count in-place changes
            return mean_pool(x, is_convolution)
        now = (x._version, is_convolution)
        kept = self._kept.get(x)  # type: ignore[no-untyped-call]
        if kept is None or kept[0] != now:
            kept = now, mean_pool(x, is_convolution)
            self._kept[x] = kept
        average: Tensor = kept[1]
        return average
