"""Laws of experts fused into the weights: the same outputs, the same bytes afterwards, no drift in between."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from test_text_experts import bundle as text_bundle
from test_text_experts import draw
from tiny_video import tiny_wan
from torch import Tensor, nn

from conftest import (
    TARGETS,
    OneLayer,
    attach_to_layer,
    carriers,
    count_graphs,
    max_error,
    normal,
    randomise,
    scales,
    tiny_pipeline,
    tiny_unet,
    unet_inputs,
)
from timestep_experts.formats import Bundle
from timestep_experts.inference import Reencoder, attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale, fuse, is_fused, unfuse
from timestep_experts.mixture.fast import fusing
from timestep_experts.mixture.fast.fusing import holds_experts
from timestep_experts.models import Wan

SPEC = MixtureSpec(scales(8, 3, 1, base_gate=0.5))
TIMES = (999, 640, 630, 3)  # 640 and 630 share an eighth


@torch.no_grad()
def predict(unet: UNet2DConditionModel, t: Any, num_samples: int = 3) -> Tensor:
    latents, text = unet_inputs(num_samples)
    return unet(latents.to(unet.dtype), t, text.to(unet.dtype)).sample


def equipped(unet: UNet2DConditionModel, spec: MixtureSpec = SPEC) -> Mixture:
    mixture = randomise(Mixture.attach(unet, spec, TARGETS))
    mixture.mode = "switch"
    return mixture


def bytes_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def require_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


class TwoLayers(nn.Module):
    """A linear layer and a convolution behind a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(self.linear(sample).transpose(1, 3))


# Fused is unfused


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(
    carrier=carriers(),
    base_gate=st.sampled_from([0, 0.5, 1, -2]),
    times=st.lists(st.integers(0, 8000).map(lambda eighths: eighths / 8), min_size=1, max_size=4),
)
def test_fused_layer_says_what_the_unfused_one_says(carrier, base_gate, times):
    layer, x, spec = carrier
    (core,) = spec.scales
    context = replace(core, name="context", partition=Partition.uniform(3), gated=True, base_gate=base_gate)
    net, mixture = attach_to_layer(layer, MixtureSpec((core, context)), "switch")
    mixture.layers["layer"].double()
    with torch.no_grad():
        expected = [net(x, torch.tensor(t)) for t in times]
        fuse(mixture)
        for t, y in zip(times, expected, strict=True):
            # fp64 but for gates, which are fp32 and exact here
            assert max_error(net(x, torch.tensor(t)), y) <= 1e-10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_unet_says_what_the_unfused_one_says(unet, layout):
    unet.to(memory_format=layout)
    mixture = equipped(unet)
    expected = {t: predict(unet, t) for t in TIMES}
    fuse(mixture)
    for t in (*TIMES, *TIMES):
        for form in (t, torch.tensor(t), torch.full((3,), t)):
            assert max_error(predict(unet, form), expected[t]) <= 1e-5  # fp32 near 1, summed in another order
    assert max_error(expected[640], expected[3]) > 1e-2
    assert all(holds_experts(layer) for layer in mixture.layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
def test_a_fused_weight_is_rounded_once(dtype, is_autocast):
    net, mixture = attach_to_layer(nn.Linear(64, 48), SPEC, "switch")
    net.to(dtype)
    layer = mixture.layers["layer"].to(dtype)
    exact = net.layer.weight.detach().double()
    for scale in SPEC.scales:
        stack, owner = layer.experts[scale.name], scale.partition.index_of(640)
        exact = exact + scale.constant_gate * scale.scaling * (stack.B[owner].double() @ stack.A[owner].double())
    fuse(mixture)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        net(normal(2, 3, 64).to(dtype), torch.tensor(640))
    # half a unit in the last place, and what fp32 loses before
    allowed = 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((net.layer.weight.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fusing_in_half_precision_stays_close(dtype):
    reference = tiny_unet()
    equipped(reference)
    unet = tiny_unet()
    mixture = equipped(unet)
    unet.to(dtype)
    expected, unfused = predict(reference, 640), predict(unet, 640)
    fuse(mixture)
    error = max_error(predict(unet, 640), expected)
    effect = max_error(expected, predict(tiny_unet(), 640))
    assert error < effect / 3
    assert error < 2 * max_error(unfused, expected) + torch.finfo(dtype).eps


def test_a_batch_of_mixed_owners_is_computed_unfused_and_no_bit_differs(unet):
    mixture = equipped(unet)
    mixed = torch.tensor([3.0, 510.5, 999.0])
    expected = predict(unet, mixed)
    fuse(mixture)
    fused = predict(unet, 640)
    assert torch.equal(predict(unet, mixed), expected)
    assert torch.equal(predict(unet, 640), fused)
    same_owners = torch.tensor([630.0, 640.0, 650.0])
    predict(unet, same_owners)
    assert all(holds_experts(layer) for layer in mixture.layers.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2),
        lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
    ],
    ids=["grouped", "circular"],
)
def test_layers_whose_weight_cannot_hold_the_update_keep_their_experts_beside(make):
    net, mixture = attach_to_layer(make(), SPEC, "switch")
    x = normal(2, 6, 5, 5)
    with torch.no_grad():
        expected = net(x, torch.tensor(640))
        fuse(mixture)
        assert is_fused(mixture)
        assert torch.equal(net(x, torch.tensor(640)), expected)
    assert not holds_experts(mixture.layers["layer"])


def test_a_weight_that_two_layers_share_is_left_alone():
    net = TwoLayers().eval()
    net.other = nn.Linear(6, 6)
    net.other.weight = net.linear.weight
    mixture = randomise(Mixture.attach(net, SPEC, ["linear", "conv"]))
    mixture.mode = "switch"
    x = normal(2, 5, 5, 6)
    shared = net.other.weight.detach().clone()
    with torch.no_grad():
        expected = net(x, torch.tensor(640))
        fuse(mixture)
        assert max_error(net(x, torch.tensor(640)), expected) <= 1e-5  # fp32 near 1
    assert torch.equal(net.other.weight, shared)
    assert [holds_experts(layer) for layer in mixture.layers.values()] == [False, True]


# The bytes


def test_a_thousand_swaps_leave_no_trace():
    net = TwoLayers().eval()
    before = bytes_of(net)
    mixture = randomise(Mixture.attach(net, SPEC, ["linear", "conv"]))
    mixture.mode = "switch"
    x = normal(2, 5, 5, 6)
    times = torch.randint(0, 1000, (1000,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fuse(mixture)
        first = net(x, torch.tensor(640))
        for t in times:
            net(x, t)
        assert torch.equal(net(x, torch.tensor(640)), first)
    unfuse(mixture)
    assert not is_fused(mixture)
    require_same(net.state_dict(), before)
    mixture.detach()
    require_same(net.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_detaching_restores_the_bytes(unet, dtype):
    unet.to(dtype)
    before, buffers = bytes_of(unet), [name for name, _ in unet.named_buffers()]
    mixture = equipped(unet)
    fuse(mixture)
    for t in TIMES:
        predict(unet, t)
    mixture.detach()
    require_same(unet.state_dict(), before)
    assert [name for name, _ in unet.named_buffers()] == buffers


def test_a_swap_that_fails_half_way_can_be_repeated_or_undone(unet, monkeypatch):
    before = bytes_of(unet)
    mixture = equipped(unet)
    expected = predict(unet, 3)
    fuse(mixture)
    predict(unet, 640)
    make, made = fusing.fused_weight, []

    def fail_at_the_third(layer, owners):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError
        return make(layer, owners)

    monkeypatch.setattr(fusing, "fused_weight", fail_at_the_third)
    with pytest.raises(MemoryError):
        predict(unet, 3)
    made.clear()
    with pytest.raises(MemoryError):
        predict(unet, 640)  # the weights are those of neither
    monkeypatch.undo()
    assert max_error(predict(unet, 3), expected) <= 1e-5
    made.clear()
    monkeypatch.setattr(fusing, "fused_weight", fail_at_the_third)
    with pytest.raises(MemoryError):
        predict(unet, 640)
    mixture.detach()
    require_same(unet.state_dict(), before)


def test_weights_are_written_only_when_an_owner_changes():
    net, mixture = attach_to_layer(nn.Linear(6, 4), MixtureSpec(scales(8, 3, 1)), "switch")  # contexts rest at 0
    weight, x = net.layer.weight, normal(2, 3, 6)
    fuse(mixture)
    versions = []
    with torch.no_grad():
        for t in (999, 990, 880, 870, 340, 330, 320):  # of the thirds, which are silent, the last two differ
            net(x, torch.tensor(t))
            versions.append(weight._version)
    assert [version - versions[0] for version in versions] == [0, 0, 0, 1, 2, 2, 2]


def test_the_experts_own_state_does_not_know_of_fusing(unet):
    mixture = equipped(unet)
    before, keys = bytes_of(mixture), list(unet.state_dict())
    fuse(mixture)
    predict(unet, 640)
    require_same(mixture.state_dict(), before)
    assert list(unet.state_dict()) == keys
    other = {key: 0.5 * value for key, value in before.items()}
    mixture.load_state_dict(other)  # and is heard at once
    fused = predict(unet, 640)
    unfuse(mixture)
    assert max_error(predict(unet, 640), fused) <= 1e-5


def test_experts_that_change_in_place_are_heard_at_the_next_call(unet):
    mixture = equipped(unet)
    fuse(mixture)
    before = predict(unet, 640)
    randomise(mixture, seed=5)  # as a caller who holds the parameters may do
    fused = predict(unet, 640)
    unfuse(mixture)
    assert max_error(fused, before) > 1e-3
    assert max_error(predict(unet, 640), fused) <= 1e-5


def test_a_deep_copy_of_a_fused_network_is_independent(unet):
    mixture = equipped(unet)
    fuse(mixture)
    expected = {t: predict(unet, t) for t in TIMES}
    predict(unet, 640)
    twin = copy.deepcopy(unet)
    copied = Mixture.of(twin)
    assert is_fused(copied)
    assert torch.equal(predict(twin, 3), expected[3])
    copied.detach()
    require_same(twin.state_dict(), bytes_of(tiny_unet()))
    assert torch.equal(predict(unet, 640), expected[640])


# Modes, and what is refused


def test_off_is_the_base_to_the_bit(unet):
    base = predict(unet, 640)
    mixture = equipped(unet)
    fuse(mixture)
    fused = predict(unet, 640)
    with mixture.using("off"):
        assert torch.equal(predict(unet, 640), base)
    assert torch.equal(predict(unet, 640), fused)
    fuse(mixture)  # again: nothing
    assert torch.equal(predict(unet, 640), fused)
    unfuse(mixture)
    unfuse(mixture)
    mixture.mode = "route"
    assert not torch.equal(predict(unet, 640), fused)


@pytest.mark.parametrize("gate", ["sample", "token"])
@pytest.mark.parametrize("base_gate", [0.0, 0.5])
@pytest.mark.parametrize("t", [640, torch.tensor([640, 630, 625]), torch.tensor([999, 3, 640])])
def test_routing_with_the_core_in_the_weights_says_the_same(unet, gate, base_gate, t):
    targets = TARGETS if gate == "sample" else ["to_q", "to_v"]
    spec = MixtureSpec(scales(8, 3, 1, base_gate=base_gate), RouterForm(positions=gate))
    mixture = randomise(Mixture.attach(unet, spec, targets))
    mixture.mode = "route"
    weights = bytes_of(unet)
    beside = predict(unet, t)
    mixture.mode = "switch"
    switched = predict(unet, t)
    mixture.mode = "route"
    fuse(mixture)
    assert max_error(predict(unet, t), beside) <= 1e-5 * beside.abs().max()
    is_mixed = isinstance(t, Tensor) and 3 in t
    assert all(holds_experts(layer) is not is_mixed for layer in mixture.layers.values())
    mixture.mode = "switch"
    assert max_error(predict(unet, t), switched) <= 1e-5 * switched.abs().max()
    assert max_error(beside, switched) > 1e-3
    unfuse(mixture)
    require_same(bytes_of(unet), weights)


@pytest.mark.parametrize("mode", ["off", "foster"])
def test_only_switching_and_routing_are_fused(unet, mode):
    mixture = equipped(unet)
    if mode == "foster":
        mixture.foster("n8")
    else:
        mixture.mode = mode
    with pytest.raises(ValueError, match=f"only experts that are switched or routed can be fused.*'{mode}'"):
        fuse(mixture)
    assert not is_fused(mixture)


def test_a_fused_mixture_is_not_fostered(unet):
    mixture = equipped(unet)
    fuse(mixture)
    for change in (lambda: setattr(mixture, "mode", "foster"), lambda: mixture.foster("n8")):
        with pytest.raises(ValueError, match="unfuse them first"):
            change()
    with pytest.raises(ValueError, match="unfuse them first"), mixture.using("foster"):
        pass
    assert mixture.mode == "switch"


def test_fused_experts_are_not_trained(unet):
    mixture = equipped(unet, MixtureSpec(SPEC.scales, dropout=0.1))
    fuse(mixture)
    latents, text = unet_inputs(3)
    with pytest.raises(ValueError, match=r"for inference: .*torch\.no_grad\(\)"):
        unet(latents, 640, text)
    unet.train()
    with pytest.raises(ValueError, match="in evaluation mode"):
        predict(unet, 640)
    unet.eval()
    predict(unet, 640)


class WithoutWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4


def quantised() -> nn.Linear:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WithoutWeight, "layer: experts cannot be fused into this WithoutWeight, which has no weight"),
        (quantised, r"layer: .* this Linear, which has a Parameter of torch.int8; .* quantised base, switch unfused"),
        (lambda: nn.Linear(6, 4).to(torch.float8_e4m3fn), "Parameter of torch.float8_e4m3fn"),
        (lambda: nn.Linear(6, 4, device="meta"), "layer: .* on the meta device; offload whole models"),
    ],
    ids=["no weight", "int8", "float8", "meta"],
)
def test_weights_that_cannot_be_added_to_are_refused(layer, message):
    net = OneLayer(nn.Sequential(layer(), nn.Linear(4, 4))).eval()
    mixture = Mixture.attach(net, SPEC, ["layer.0", "layer.1"])
    mixture.mode = "switch"
    with pytest.raises(ValueError, match=message.replace("layer:", r"layer\.0:")):
        fuse(mixture)
    assert not is_fused(mixture)
    assert not hasattr(net.layer[1], "unfused_weight")


def test_networks_without_timesteps_cannot_be_fused_alone():
    encoder = nn.Sequential(nn.Linear(6, 4))
    mixture = Mixture.attach(encoder, SPEC, ["0"])
    mixture.mode = "switch"
    with pytest.raises(ValueError, match="no network of this mixture takes a timestep"):
        fuse(mixture)


def test_a_fused_layer_answers_only_within_its_denoiser(unet):
    mixture = equipped(unet)
    fuse(mixture)
    predict(unet, 640)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with (
        pytest.raises(RuntimeError, match=r"attn1\.to_q: experts are fused .*unfuse\(mixture\)"),
        mixture.at(torch.tensor([3.0])),
    ):
        layer(normal(2, 3, 16))
    unfuse(mixture)
    with mixture.at(torch.tensor([3.0])):
        layer(normal(2, 3, 16))


def test_a_schedule_of_swaps_is_compiled_at_its_first_step_without_breaks(unet):
    mixture = randomise(Mixture.attach(unet, SPEC, ["to_q", "to_k", "conv1"]))
    mixture.mode = "switch"
    fuse(mixture)
    graphs, later, breaks = count_graphs(unet)
    assert (graphs, later, breaks) == (2, 0, 0)  # the hooks are a graph of their own, or none


# Pipelines


def unet_bundle(mode: str = "switch") -> Bundle:
    mixture = randomise(Mixture.attach(tiny_pipeline().unet, SPEC, TARGETS))
    tensors = {key: value.clone() for key, value in mixture.state_dict().items()}
    return Bundle(SPEC, tuple(mixture.layers), tensors, mode, "tiny", "UNet2DConditionModel", {})


@pytest.fixture
def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_fused_pipeline_draws_the_same_pictures(quiet):
    before, weights = draw(quiet), bytes_of(quiet.unet)
    attach(quiet, unet_bundle())
    switched = draw(quiet)
    detach(quiet)
    mixture = attach(quiet, unet_bundle(), fused=True)
    assert is_fused(mixture)
    assert max_error(draw(quiet), switched) <= 1e-4  # five steps with guidance, of fp32 outputs near 1
    assert max_error(switched, before) > 1e-2
    detach(quiet)
    require_same(quiet.unet.state_dict(), weights)
    assert torch.equal(draw(quiet), before)


def test_text_encoders_with_experts_stay_unfused_and_are_heard(quiet):
    before = draw(quiet)
    attach(quiet, text_bundle(), "switch")
    switched, passes = draw(quiet), Reencoder.of(quiet).num_text_passes
    detach(quiet)
    mixture = attach(quiet, text_bundle(), "switch", fused=True)
    assert max_error(draw(quiet), switched) <= 1e-4
    assert Reencoder.of(quiet).num_text_passes == passes
    assert {path.partition(".")[0] for path, layer in mixture.layers.items() if holds_experts(layer)} == {"unet"}
    detach(quiet)
    assert torch.equal(draw(quiet), before)


def test_a_bundle_that_routes_draws_the_same_with_its_core_in_the_weights(quiet):
    before = draw(quiet)
    for bundle in (unet_bundle("route"), text_bundle()):
        attach(quiet, bundle, "route")
        routed = draw(quiet)
        detach(quiet)
        attach(quiet, bundle, "route", fused=True)
        assert max_error(draw(quiet), routed) <= 1e-4
        detach(quiet)
    assert torch.equal(draw(quiet), before)


def test_a_bundle_that_is_off_is_not_fused_and_the_pipeline_stays_as_it_was(quiet):
    before, modules = draw(quiet), list(quiet.unet.named_modules())
    for bundle in (unet_bundle("route"), text_bundle()):
        with pytest.raises(ValueError, match="only experts that are switched"):
            attach(quiet, bundle, "off", fused=True)
        assert list(quiet.unet.named_modules()) == modules
        assert Reencoder.of(quiet) is None
    assert torch.equal(draw(quiet), before)


def test_two_denoisers_are_fused_each_for_its_share():
    family = Wan(tiny_wan(0.875))
    spec = MixtureSpec((Scale("n8", Partition.uniform(8), 2, 2), Scale("n4", Partition.uniform(4), 2, 2, True, 1)))
    before = {name: bytes_of(denoiser) for name, denoiser in family.denoisers.items()}
    mixture = randomise(Mixture.attach(family.denoisers, spec, ("to_q", "to_v"), owned=family.owned_intervals))
    mixture.mode = "switch"
    noisy = normal(1, family.denoiser.config.in_channels, 3, 8, 8)
    text = family.encode_captions(["a red star"])
    times = [1000.0, 876.0, 874.0, 400.0, 900.0, 3.0]
    with torch.no_grad():
        expected = [family.predict(noisy, torch.tensor([t]), text) for t in times]
        fuse(mixture)
        for t, y in zip(times, expected, strict=True):
            assert max_error(family.predict(noisy, torch.tensor([t]), text), y) <= 1e-5
        both = torch.tensor([1000.0, 400.0])
        rows = {name: value.expand(2, *value.shape[1:]) for name, value in text.items()}
        joint = family.predict(noisy.expand(2, -1, -1, -1, -1), both, rows)
    assert max_error(joint, torch.cat([expected[0], expected[3]])) <= 1e-5
    assert all(holds_experts(layer) for layer in mixture.layers.values())
    mixture.detach()
    for name, denoiser in family.denoisers.items():
        require_same(denoiser.state_dict(), before[name])
