"""Experts folded into the base weights, so that switching costs what the base costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from timestep_experts.mixture.layer import Binding, MixtureLayer
from timestep_experts.mixture.lowrank import ExpertStack

_CARRIERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Folding:
    """The folded layers of one denoiser. Made by `Mixture.fold`.

    Every layer keeps its own weight W0 as a buffer that is in no ``state_dict`` and moves with the layer. The weight is
    always made from W0 and never from its predecessor: it does not drift, and W0 comes back to the byte.

    Three kinds of layers keep their experts beside them, and say the same: grouped convolutions (A reads all channels,
    which no grouped kernel does), convolutions whose padding is not of zeros (the experts' is), and layers that share
    their weight with another.

    Args:
        network: the denoiser.
        layers: those of its layers that carry experts.

    Raises:
        ValueError: experts cannot be added to the weight of one; nothing is changed then.
    """

    def __init__(self, network: nn.Module, layers: Sequence[MixtureLayer]) -> None:
        uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
        for layer in layers:
            _require_plain_weight(layer)
        self.layers = [layer for layer in layers if _is_exact(layer.base_layer) and uses[id(_weight(layer))] == 1]
        self._carriers = list(layers)
        self._held: dict[str, int] | None = {}  # whose experts the weights hold, by scale; None: not known

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the weights."""
        kept = [_weight(layer).detach().clone() for layer in self.layers]  # all or, where memory ends, none
        for layer, weight in zip(self.layers, kept, strict=True):
            layer.register_buffer("unfolded_weight", weight, persistent=False)

    def end(self) -> None:
        """Put the kept weights back, to the byte, and drop the copies."""
        self.hold({})
        for layer in self.layers:
            del layer.unfolded_weight

    def forget(self) -> None:
        """The experts have changed: make the weights anew before the next call."""
        self._held = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(self, binding: Binding) -> None:
        """Hold the experts that own the timesteps of the running call, or none if its samples have different owners.

        Raises:
            ValueError: gradients are enabled, or dropout is: both are the experts' own, which are in the weights.
        """
        if torch.is_grad_enabled() or any(layer.training and layer.dropout for layer in self._carriers):
            raise ValueError(
                "folded experts are for inference: call the denoiser under torch.no_grad() and in evaluation mode, or"
                " unfold them first (Mixture.unfold)"
            )
        routing = binding.routing
        assert routing is not None
        t = (routing.t[:1] if routing.is_shared else routing.t).tolist()
        scales = binding.active_scales()
        owners = {tuple(scale.partition.index_of(value) for scale in scales) for value in t}
        self.hold(dict(zip([s.name for s in scales], owners.pop(), strict=True)) if len(owners) == 1 else {})
        routing.is_folded = bool(self._held)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def hold(self, owners: Mapping[str, int]) -> None:
        """Fold these experts in, by scale, and no others; nothing is done where they are held already.

        Raises:
            ValueError: experts can no longer be added to a weight.
        """
        if owners == self._held:
            return
        self._held = None  # should one of the layers fail
        for layer in self.layers:
            _require_plain_weight(layer)  # it may have been offloaded since
            _weight(layer).copy_(folded_weight(layer, owners) if owners else layer.unfolded_weight)
            layer.is_folded = bool(owners)
        self._held = dict(owners)


def folded_weight(layer: MixtureLayer, owners: Mapping[str, int]) -> Tensor:
    """``W0 + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j]`` in fp32 or wider, shaped like the weight.

    Args:
        layer: with its kept weight W0.
        owners: i_j, which expert of each speaking scale.
    """
    kept: Tensor = layer.unfolded_weight
    with torch.autocast(kept.device.type, enabled=False):
        total = kept.to(torch.promote_types(kept.dtype, torch.float32)).flatten(1)
        for scale in layer.binding.spec.scales:
            if scale.name in owners:
                stack = cast("ExpertStack", layer.experts[scale.name])
                owner = torch.tensor([owners[scale.name]], device=stack.A.device)
                down, up = (weight[0].to(total.dtype) for weight in stack.of(owner))
                total = torch.addmm(total, up, down, alpha=scale.constant_gate * scale.scaling)
        return total.view(kept.shape)


def _weight(layer: MixtureLayer) -> nn.Parameter:
    return layer.base_layer.weight  # type: ignore[return-value]  # a plain one, by _require_plain_weight


def _require_plain_weight(layer: MixtureLayer) -> None:
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    if not isinstance(base, _CARRIERS) or type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        held = "no weight" if not isinstance(weight, Tensor) else f"a {type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"{layer.name}: experts cannot be folded into this {type(base).__name__}, which has {held}; allowed are"
            " linear layers and convolutions with plain floating-point weights. Over a quantised base, switch unfolded"
        )
    if weight.is_meta:
        raise ValueError(
            f"{layer.name}: experts cannot be folded into a weight that is on the meta device; offload whole models,"
            " not layer by layer, or switch unfolded"
        )


def _is_exact(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) or bool(base.groups == 1 and base.padding_mode == "zeros")
