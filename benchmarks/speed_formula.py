"""What a layer with experts computes and moves beside the bare layer: floating-point operations and bytes.

One call on B samples of N positions, c input and d output channels, a kernel of K positions (1 for a linear layer), so
k = cK inputs per output; e bytes per element. All s scales that speak are applied at once, as one set of the joint rank
R, the sum of their ranks; scale j has n_j experts.

    bare layer, forward     2 B N k d                flops     e (B N c + k d + B N d)                      bytes
    bare layer, backward    2 B N k d                          e (B N c + k d + B N d)          to the input alone
    set, forward            2 B N R (k + d)                    e (B N c + 2 B N d + 2 B N R + w R (k + d))
    set, backward           4 B N R (k + d)                    e (5 B N c + 2 B N d + 4 B N R
                                                                  + 3 B R (k + d) + sum_j n_j r_j (k + d))
    router of m contexts    2 B c m, backward 4 B c m          f B N c,  backward 4 e B N c

w counts passes over the low-rank weights: B to read them per sample, 2 B to gather them where a scale has several
experts, 2 B to join them where s > 1, and 1 in all where nothing is chosen (every n_j = 1). The set reads x, and reads
and writes the output. f is e, and e + 8 where the router's average needs an fp32 copy of x. Backward, the input's
gradient is written and added (4 B N c beside reading x), and the gradient of a scale is as large as all its experts.

Elementwise work on low-rank features and gates, launches of kernels and Python are left out, so where those count the
formula is too low. Time is ``flops / rate + bytes / bandwidth``, with the rates of a large matrix product and a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one call.

    Args:
        flops: a multiplication and an addition are two.
        num_bytes: read and written.
    """

    flops: float
    num_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Time at so many flops and bytes a second, one after the other."""
        return self.flops / rate + self.num_bytes / bandwidth


@dataclass(frozen=True)
class Layer:
    """One call of a layer; letters as above."""

    batch: int
    positions: int
    inputs: int
    outputs: int
    kernel: int = 1
    element: int = 4

    def bare(self, *, training: bool) -> Cost:
        """The layer without experts; its backward pass goes to the input alone."""
        bnc, bnd = self.batch * self.positions * self.inputs, self.batch * self.positions * self.outputs
        weight = self.inputs * self.kernel * self.outputs
        passes = 2 if training else 1
        return Cost(passes * 2 * bnc * self.kernel * self.outputs, passes * self.element * (bnc + weight + bnd))

    def experts(self, scales: Sequence[tuple[int, int]], *, training: bool) -> Cost:
        """All scales that speak, applied at once: pairs of their number of experts and rank."""
        b, rank, width = self.batch, sum(r for _, r in scales), self.inputs * self.kernel + self.outputs
        bn = b * self.positions
        passes = 1 if all(n == 1 for n, _ in scales) else 3 * b
        passes += 2 * b if len(scales) > 1 else 0
        moved = bn * (self.inputs + 2 * self.outputs + 2 * rank) + passes * rank * width
        flops = 2 * bn * rank * width
        if training:
            flops *= 3
            moved += bn * (5 * self.inputs + 2 * self.outputs + 4 * rank) + 3 * b * rank * width
            moved += sum(n * r for n, r in scales) * width
        return Cost(flops, self.element * moved)

    def router(self, num_contexts: int, *, training: bool) -> Cost:
        """The gates of m contexts, one per sample."""
        if not num_contexts:
            return Cost(0, 0)
        bnc = self.batch * self.positions * self.inputs
        moved = bnc * (self.element + (8 if self.element < 4 else 0))
        moved += 4 * bnc * self.element if training else 0
        return Cost((3 if training else 1) * 2 * self.batch * self.inputs * num_contexts, moved)

    def mixture(self, num_experts: int, rank: int, num_contexts: int, *, training: bool) -> Cost:
        """All that the benchmark's mixture adds: a core of n experts, and m routed contexts of 2^i experts."""
        scales = [(num_experts, rank), *((2**i, rank) for i in range(num_contexts))]
        return self.experts(scales, training=training) + self.router(num_contexts, training=training)


def predicted_ratio(bare: Cost, extra: Cost, rate: float, bandwidth: float) -> float:
    """Time with experts over time without."""
    return 1 + extra.seconds(rate, bandwidth) / bare.seconds(rate, bandwidth)
