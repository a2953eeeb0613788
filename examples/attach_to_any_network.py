"""Timestep experts on a network that is no diffusion model of diffusers: attach, train one interval, switch, detach.

Run: python examples/attach_to_any_network.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, asymmetric


class TinyDenoiser(nn.Module):
    """Any module whose ``forward`` takes a ``timestep`` will do."""

    def __init__(self) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(8, 32)
        self.to_noise = nn.Linear(32, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # noqa: ARG002 - read by the mixture's hook
        """Predict noise ``(B, 8)``."""
        noise: Tensor = self.to_noise(torch.relu(self.to_hidden(sample)))
        return noise


def main() -> None:
    """Teach the experts of high noise to say zero, and see that those of low noise have not changed."""
    torch.manual_seed(0)
    model = TinyDenoiser().requires_grad_(False)
    scales = asymmetric([Scale(f"n{n}", Partition.uniform(n), rank=4, alpha=4) for n in (8, 1)])
    mixture = Mixture.attach(model, MixtureSpec(scales), ["to_hidden", "to_noise"])
    x, high, low = torch.randn(64, 8), torch.tensor(900), torch.tensor(100)
    before = model(x, low)

    mixture.foster("n8")
    experts = [p for stack in mixture.stacks("n8") for p in stack.parameters()]
    optimiser = torch.optim.AdamW(experts, lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        loss = model(x, high).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    mixture.mode = "switch"
    print(f"loss at t = 900: {model(x, high).square().mean().item():.5f}")
    print(f"change at t = 100: {(model(x, low) - before).abs().max().item():.5f}")
    print(mixture.count_parameters())
    mixture.detach()


if __name__ == "__main__":
    main()
