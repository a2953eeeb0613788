"""One layer with experts: ``base(x) + core + gated contexts``  (TSM, eq. 5).

Shapes: B rows of a batch, N positions, k input features, m gated scales.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval
from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.kernels import Experts, Strength
from timestep_experts.mixture.plain import latent_rms, masked_mean
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.spec import Scale
from timestep_experts.mixture.state import MixtureState, StepContext, per_row


class MixtureLayer(nn.Module):
    """The experts of one base layer, one stack per scale, with a router if any scale is gated.

    The base layer stays where it is. A hook on it adds the experts to its output, so a network keeps its modules, its
    ``state_dict`` and whatever others have done to it: LoRAs around the layer, offloading, compilation.

    Args:
        base_layer: a linear layer or a convolution.
        state: of the mixture.
        name: of the layer in its network.
        owned: the interval of t that the network works on; its layers hold no experts of other timesteps. ``None``
            means all timesteps.
        reads_text: whether the layer's positions are tokens of the text, of which some may be padding.
        seed: of the initial A, which depends on it, the layer's name and the scale's name alone.

    Raises:
        UserError: the layer cannot carry experts, or a gate per position is wanted and it changes the positions.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        state: MixtureState,
        name: str,
        owned: Interval | None = None,
        *,
        reads_text: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        spec = state.spec
        vars(self)["base_layer"] = base_layer  # known, but not a part of this module: it belongs to its network
        self.name = name
        self.state = state
        self.dropout = spec.dropout
        self.reads_text = reads_text
        self.geometry = LayerGeometry.of(base_layer, name)
        is_per_input = spec.router.positions == "token" and not spec.router.hears_latents
        if is_per_input and spec.gated_scales and not self.geometry.keeps_positions:
            raise UserError(
                f"{name}: a gate per position needs a layer that keeps positions; this {type(base_layer).__name__} has"
                f" kernel {self.geometry.kernel_size}, stride {self.geometry.stride}, padding {self.geometry.padding}"
            )
        self.experts = nn.ModuleDict({scale.name: self._stack(scale, owned, seed) for scale in spec.scales})
        self.router = None
        if spec.gated_scales:
            self.router = Router(self.geometry.in_features, spec.gated_scales, spec.num_train_timesteps, spec.router)

    def _stack(self, scale: Scale, owned: Interval | None, seed: int) -> ExpertStack:
        """The experts of a scale whose intervals meet the one that the network works on."""
        met = [i for i, interval in enumerate(scale.partition.intervals) if owned is None or interval.meets(owned)]
        own = hashlib.sha256(f"{seed}/{self.name}/{scale.name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(own[:8], "little"))
            return ExpertStack(self.geometry, len(met), scale.rank, self.name, met[0] if owned else None)

    def train(self, mode: bool = True) -> MixtureLayer:
        """Set the training mode of the base layer too: dropout of the experts follows it."""
        self.base_layer.train(mode)
        return super().train(mode)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def move_experts(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move experts and router to a device, and the experts to a dtype; routers stay fp32."""
        with torch.inference_mode(False):
            self.experts.to(device, dtype)
            if self.router is not None:
                self.router.to(device)

    def after_base(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """The hook on the base layer."""
        return self.forward(args[0] if args else next(iter(kwargs.values())), y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j] x``  (TSM, eq. 5).

        The sum goes over the scales that are active in the mixture's mode, and ``i_j`` is the expert of scale j that
        owns the sample's timestep.

        Args:
            x: the base layer's input.
            y: its output. Experts work where it is, and move there if they are elsewhere.

        Raises:
            RuntimeError: experts are active and no timestep is known.
        """
        scales = self.state.active_scales()
        return self.add_experts(x, y, scales) if scales else y

    def add_experts(self, x: Tensor, y: Tensor, scales: Sequence[Scale], *, only_routed: bool = False) -> Tensor:
        """The sum of `forward` over some scales.

        Args:
            x: the base layer's input.
            y: its output.
            scales: at least one.
            only_routed: of the gates, leave out what is constant, for it stands in the base layer's weight.
        """
        step, kernels = self._running_step(), self.state.kernels
        stacks: list[Any] = [self.experts[scale.name] for scale in scales]
        if stacks[0].A.device != y.device:
            self.move_experts(y.device)
        x = x.to(y.device)  # a layer that is offloaded by itself gets its input from anywhere
        expert_index = [per_row(step.expert_index[scale.name], len(x)) for scale in scales]
        experts = kernels.gather(stacks, expert_index, len(x), self.geometry.groups)
        kept = functional.dropout(x, self.dropout) if self.dropout and self.base_layer.training else x
        mask = step.text_mask if self.reads_text else None
        pools = self._pools_input()
        hidden, pooled = kernels.read(kept, x if pools and mask is None else None, experts, self.geometry)
        if self._hears_latents():
            z = self._latent_features(scales, hidden, experts, mask)
        elif pooled is None:
            z = masked_mean(self._positions(x), mask) if pools and mask is not None else self._positions(x)
        else:
            z = pooled
        strengths = self._strengths(scales, z, step, only_routed=only_routed)
        return kernels.add(self.base_layer, y, hidden, experts, strengths, self.geometry)

    def _running_step(self) -> StepContext:
        if self.state.step is None:
            raise RuntimeError(
                f"{self.name}: the experts know no timestep. Call the denoiser itself (its hook reads the timestep),"
                " or bind one with Mixture.at(t)."
            )
        return self.state.step

    def _pools_input(self) -> bool:
        return self.state.mode == "route" and self.router is not None and self.router.needs_pooled_input

    def _hears_latents(self) -> bool:
        return self.state.mode == "route" and self.router is not None and self.router.form.hears_latents

    def _latent_features(
        self, scales: Sequence[Scale], hidden: Sequence[Tensor], experts: Experts, mask: Tensor | None
    ) -> Tensor:
        """The size of each latent of the gated scales, relative to the others."""
        latents = self.state.kernels.by_scale(hidden, experts, self.geometry)
        gated = [own for own, scale in zip(latents, scales, strict=True) if scale.gated]
        return latent_rms(torch.cat(gated, 2), mask, self.state.spec.router.positions)

    def _strengths(
        self, scales: Sequence[Scale], z: Tensor, step: StepContext, *, only_routed: bool = False
    ) -> list[Strength]:
        """``gate_j * (alpha_j / r_j)`` of the active scales.

        The gate of a core is 1. That of a context is its base gate, to which the router's ``G(z, t)`` is added in mode
        ``route``. While scales are fostered, every gate is 1.

        Args:
            scales: the active ones.
            z: what stands for the layer's input, ``(B, N, h)`` or ``(B, h)``; see `Router`.
            step: the running forward pass.
            only_routed: leave the constant parts out.
        """
        state = self.state
        if state.mode == "foster":
            return [scale.scaling for scale in scales]
        constant = [0.0 if only_routed else scale.constant_gate * scale.scaling for scale in scales]
        if state.mode == "switch" or self.router is None:
            return [*constant]
        gates: Tensor = self.router(z, self._timed(step, self.router, z))
        if state.gate_log is not None:
            state.gate_log.setdefault(self.name, []).append(gates.detach().expand(len(z), *gates.shape[1:]))
        by_position = gates if gates.dim() == 3 else gates[:, None]
        routed = iter(torch.split(by_position, list(self.router.widths), -1))
        return [
            _scaled(next(routed), s.scaling, rest) if s.gated else rest
            for s, rest in zip(scales, constant, strict=True)
        ]

    def _timed(self, step: StepContext, router: Router, z: Tensor) -> Tensor | None:
        """What the router's table adds for each row of z."""
        if not router.form.has_table:
            return None
        timed = step.timed.get(self.name)
        if timed is None:  # the timesteps were bound by hand, or in another mode
            (timed,) = self.state.kernels.read_tables([router], self.state.index_of(step.t))
        return per_row(timed.to(z.device), len(z))

    def _positions(self, x: Tensor) -> Tensor:
        """The layer's input as ``(B, N, k)``."""
        return x.flatten(2).transpose(1, 2) if self.geometry.is_convolution else x.reshape(len(x), -1, x.shape[-1])


def _scaled(gate: Tensor, scaling: float, constant: float) -> Tensor:
    """``gate * scaling + constant``, without the operations that change nothing."""
    scaled = gate if scaling == 1 else gate * scaling
    return scaled if constant == 0 else scaled + constant
