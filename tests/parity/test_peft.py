"""Parity with PEFT: one expert for all timesteps is a LoRA, and target patterns select what PEFT selects."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from conftest import CONV_TARGETS, LINEAR_TARGETS, OneLayer, max_error, normal, randomise, tiny_unet, unet_inputs
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, match_targets

LEAVES = sorted({name for name, module in tiny_unet().named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))})


def inject(model, targets, rank=4, alpha=4.0):
    """PEFT's LoRA layers in a model, by module name."""
    targets = targets if isinstance(targets, str) else list(targets)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_pair(model, twin, targets, rank, alpha):
    """The same random LoRA in both: a mixture with n = 1 on ``model``, PEFT's on ``twin``."""
    scale = Scale("lora", Partition.uniform(1), rank, alpha)
    mixture = randomise(Mixture.attach(model, MixtureSpec((scale,)), targets))
    mixture.mode = "switch"
    peers = inject(twin, targets, rank, alpha)
    assert set(peers) == set(mixture.layers)
    with torch.no_grad():
        for name, layer in mixture.layers.items():
            stack, lora_a, lora_b = layer.experts["lora"], *peer_weights(peers[name])
            lora_a.copy_(stack.A[0].view(lora_a.shape))
            lora_b.copy_(stack.B[0].view(lora_b.shape))
    return mixture, peers


def as_dtype(model, dtype):
    return model.double() if dtype == torch.float64 else model.float()


def peer_weights(peer):
    return peer.lora_A["default"].weight, peer.lora_B["default"].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (3, 1), (1, 16)])
@pytest.mark.parametrize("targets", [LINEAR_TARGETS, CONV_TARGETS, LINEAR_TARGETS + CONV_TARGETS], ids=len)
def test_one_expert_is_a_lora_forward_and_backward(targets, rank, alpha, dtype):
    unet, twin = tiny_unet(), tiny_unet()
    latents, text = (value.to(dtype) for value in unet_inputs(2))
    t = torch.tensor([7, 950])
    base = as_dtype(tiny_unet(), dtype)(latents, t, text).sample.detach()
    mixture, peers = lora_pair(unet, twin, targets, rank, alpha)
    ours, theirs = (as_dtype(model, dtype)(latents, t, text).sample for model in (unet, twin))
    assert max_error(ours, base) > 1e-3
    # Outputs near 1. fp64 leaves only alpha / r, kept in fp32; in fp32 sixty layers round, each in its own order.
    assert max_error(ours, theirs) <= {torch.float32: 2e-6, torch.float64: 5e-8}[dtype]
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, layer in mixture.layers.items():
        for own, peer in zip(layer.experts["lora"].parameters(), peer_weights(peers[name]), strict=True):
            # as above, through twice as many layers
            tolerance = {torch.float32: 2e-5, torch.float64: 2e-7}[dtype] * peer.grad.abs().max().item()
            assert max_error(own.grad[0].view(peer.shape), peer.grad) <= tolerance


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4, bias=False), (2, 6)),
        (lambda: nn.Linear(6, 4), (2, 3, 5, 6)),
        (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 6, 9)),
        (lambda: nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(0, 1), groups=2), (2, 6, 8, 7)),
        (lambda: nn.Conv2d(6, 4, 1, groups=2), (2, 6, 8, 7)),
        (lambda: nn.Conv2d(6, 6, 3, padding="same"), (2, 6, 8, 7)),
        (lambda: nn.Conv3d(6, 4, 3, stride=(1, 2, 2), padding=1), (2, 6, 3, 6, 5)),
    ],
    ids=["linear", "linear-4d", "conv1d", "grouped", "pointwise-grouped", "same", "conv3d"],
)
def test_one_expert_is_a_lora_on_any_layer(make, shape):
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(OneLayer(make()).eval())
    lora_pair(*nets, ["layer"], rank=4, alpha=2)
    x = normal(*shape)
    with torch.no_grad():
        assert max_error(nets[0](x, torch.tensor(7)), nets[1](x, torch.tensor(7))) <= 1e-6  # fp32 values near 1


@pytest.mark.parametrize("layer", [nn.Linear(64, 8), nn.Conv2d(16, 8, 3)], ids=["linear", "conv"])
def test_experts_start_like_a_lora(layer):
    net, twin = OneLayer(layer), OneLayer(layer)
    mixture = Mixture.attach(net, MixtureSpec((Scale("core", Partition.uniform(4), 32, 32),)), ["layer"])
    stack = mixture.layers["layer"].experts["core"]
    mixture.detach()
    lora_a, lora_b = peer_weights(inject(twin, ["layer"], rank=32)["layer"])
    bound = 1 / math.sqrt(lora_a[0].numel())  # Kaiming uniform with a = sqrt 5
    for weight in [*stack.A, lora_a.flatten(1)]:
        # more than 2,000 uniform numbers reach within 1 % of the bound, and their deviation is within 5 %
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.05
    assert len({weight.flatten()[0].item() for weight in stack.A}) == 4
    assert not stack.B.any()
    assert not lora_b.any()


@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0"],
        ["attn1.to_q", "attn2.to_out.0"],
        ["mid_block.resnets.0.conv1"],
        ["conv1", "mid_block.resnets.0.conv1", "conv_in"],
        ["net.2", "0.proj"],
        r".*\.to_[qkv]",
        r"(down|up)_blocks\.\d\.attentions\..*attn2\.to_(q|out\.0)",
        r"mid_block\.resnets\.\d\.conv[12]",
        r"conv_(in|out)",
    ],
    ids=str,
)
def test_patterns_select_what_peft_selects(targets):
    unet = tiny_unet()
    assert sorted(match_targets(unet, targets)) == sorted(inject(unet, targets))


@settings(max_examples=8)
@given(choice=st.lists(st.tuples(st.sampled_from(LEAVES), st.integers(1, 6)), min_size=1, max_size=4))
def test_endings_of_names_select_what_peft_selects(choice):
    endings = []
    for name, length in choice:
        parts = name.split(".")
        # A bare number also ends the names of blocks, which carry no experts in either library.
        endings.append(".".join(parts[-max(length, 1 + parts[-1].isdigit()) :]))
    unet = tiny_unet()
    assert sorted(match_targets(unet, endings)) == sorted(inject(unet, endings))
