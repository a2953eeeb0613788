"""What diffusers, PEFT, accelerate and torch may do to a pipeline that carries experts works, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny import flux, stable_diffusion_3
from torch import Tensor, nn

from conftest import OneLayer, max_error, randomise, scales, tiny_pipeline, unet_inputs
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle
from timestep_experts.inference import attach, detach
from timestep_experts.inference.attach import mixture_of
from timestep_experts.mixture import Mixture, MixtureSpec

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut"]
LORA = "lora.safetensors"
CPU = torch.device("cpu")


def bundle() -> Bundle:
    mixture = randomise(Mixture.attach(tiny_pipeline().unet, MixtureSpec(scales(4, 1)), TARGETS))
    return Bundle(
        mixture.spec, tuple(mixture.layers), mixture.state_dict(), "route", "tiny", "UNet2DConditionModel", {}
    )


@torch.no_grad()
def predict(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    latents, text = unet_inputs(2)
    return unet(latents.to(dtype), torch.tensor(640), text.to(dtype)).sample.float()


def attached() -> Tensor:
    """What the tiny UNet says with the experts and nothing else."""
    pipeline = tiny_pipeline()
    attach(pipeline, bundle())
    return predict(pipeline.unet)


# Projections that are fused are not called one by one


@pytest.mark.parametrize("make", [tiny_pipeline, stable_diffusion_3, flux])
def test_fused_projections_are_refused_before_and_after(make: Callable[[], Any]) -> None:
    pipeline = make()
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    network.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        Mixture.attach(network, MixtureSpec(scales(4, 1)), ["to_q"])
    assert not any(module._forward_hooks for module in network.modules())
    Mixture.attach(network, MixtureSpec(scales(4, 1)), ["to_out.0"])  # is called all the same


def test_projections_that_are_fused_later_are_refused_at_the_next_call() -> None:
    pipeline = tiny_pipeline()
    mixture = attach(pipeline, bundle())
    pipeline.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        predict(pipeline.unet)
    mixture.mode = "off"
    predict(pipeline.unet)
    mixture.mode = "route"
    pipeline.unfuse_qkv_projections()
    assert torch.equal(predict(pipeline.unet), attached())


def test_a_projection_that_is_read_and_never_called_is_refused() -> None:
    net = OneLayer(nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match=r"layer\.out_proj.*MultiheadAttention"):
        Mixture.attach(net, MixtureSpec(scales(4)), ["out_proj"])


# LoRAs


def add_lora(pipeline: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="style")


def test_the_order_of_a_lora_and_experts_does_not_matter() -> None:
    first, later = tiny_pipeline(), tiny_pipeline()
    add_lora(first)
    attach(first, bundle())
    attach(later, bundle())
    add_lora(later)
    both = predict(first.unet)
    assert torch.equal(predict(later.unet), both)
    assert list(mixture_of(first).layers) == list(mixture_of(later).layers) == list(bundle().target_modules)
    assert max_error(both, attached()) > 1e-2
    for pipeline in (first, later):
        pipeline.unet.set_adapters("style", 0.0)
        assert max_error(predict(pipeline.unet), attached()) == 0
        pipeline.unload_lora_weights()
        assert torch.equal(predict(pipeline.unet), attached())  # experts stay
        detach(pipeline)
        assert torch.equal(predict(pipeline.unet), predict(tiny_pipeline().unet))
        assert list(pipeline.unet.state_dict()) == list(tiny_pipeline().unet.state_dict())


def test_a_lora_file_is_loaded_fused_and_unloaded_beside_experts(tmp_path: Path) -> None:
    donor = tiny_pipeline()
    add_lora(donor)
    donor.unet.save_lora_adapter(tmp_path, adapter_name="style", weight_name=LORA)
    beside, fused = tiny_pipeline(), tiny_pipeline()
    attach(beside, bundle())
    beside.unet.load_lora_adapter(tmp_path, weight_name=LORA, prefix=None, adapter_name="style")
    expected = predict(beside.unet)
    fused.unet.load_lora_adapter(tmp_path, weight_name=LORA, prefix=None, adapter_name="style")
    fused.unet.fuse_lora()
    attach(fused, bundle())
    assert max_error(predict(fused.unet), expected) <= 1e-5  # fp32: one product more, rounded otherwise
    beside.unload_lora_weights()
    assert torch.equal(predict(beside.unet), attached())


def test_a_lora_that_is_fused_into_fused_experts_is_refused_before_it_is_lost() -> None:
    pipeline = tiny_pipeline()
    add_lora(pipeline)
    attach(pipeline, bundle(), "switch", fused=True)
    predict(pipeline.unet)
    pipeline.unet.fuse_lora()
    with pytest.raises(UserError, match="fuse LoRAs before experts"):
        detach(pipeline)
    pipeline.unet.unfuse_lora()
    detach(pipeline)
    pipeline.unload_lora_weights()
    assert max_error(predict(pipeline.unet), predict(tiny_pipeline().unet)) <= 1e-5  # unfused by subtraction


def test_the_scale_of_loras_is_not_ignored_in_silence() -> None:
    pipeline = tiny_pipeline()
    attach(pipeline, bundle())
    latents, text = unet_inputs(2)
    with pytest.warns(UserWarning, match=r"'scale': 0\.5.*experts act in full"), torch.no_grad():
        pipeline.unet(latents, 640, text, cross_attention_kwargs={"scale": 0.5})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        pipeline.unet(latents, 640, text, cross_attention_kwargs={"scale": 1.0})


# Files


def test_saving_a_pipeline_that_carries_experts_saves_the_base(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    base = predict(pipeline.unet)
    attach(pipeline, bundle())
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(predict(StableDiffusionPipeline.from_pretrained(tmp_path).unet), base)


# Compilers


@pytest.mark.parametrize("what", ["module", "blocks", "in place"])
def test_experts_are_attached_to_what_is_compiled_and_taken_off(what: str) -> None:
    torch._dynamo.reset()
    pipeline, experts = tiny_pipeline(), bundle()
    unet, base = pipeline.unet, predict(pipeline.unet)
    if what == "module":
        pipeline.unet = torch.compile(unet, backend="eager")
    elif what == "blocks":
        unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    else:
        unet.compile(backend="eager")
    assert max_error(predict(pipeline.unet), base) <= 2e-6
    mixture = attach(pipeline, experts)
    assert list(mixture.layers) == list(experts.target_modules)
    assert max_error(predict(pipeline.unet), attached()) <= 1e-5  # fp32: written for compilers, term by term
    assert mixture_of(pipeline).layers.keys() == mixture.layers.keys()
    detach(pipeline)
    assert not unet._forward_pre_hooks
    assert max_error(predict(pipeline.unet), base) <= 2e-6


# Devices and dtypes


def offload_layer_by_layer(unet: nn.Module) -> None:
    accelerate.cpu_offload(unet, CPU)


def offload_in_groups(unet: nn.Module) -> None:
    apply_group_offloading(unet, CPU, CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_layer_by_layer, offload_in_groups])
def test_offloading_before_or_after_changes_nothing(offload: Callable[[nn.Module], None]) -> None:
    before, after = tiny_pipeline(), tiny_pipeline()
    offload(before.unet)
    attach(before, bundle())
    attach(after, bundle())
    offload(after.unet)
    for pipeline in (before, after):
        assert {value.device for value in mixture_of(pipeline).state_dict().values()} == {CPU}
        assert torch.equal(predict(pipeline.unet), attached())


def test_offloading_to_the_disk_changes_nothing(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    attach(pipeline, bundle())
    accelerate.disk_offload(pipeline.unet, tmp_path, CPU)
    assert torch.equal(predict(pipeline.unet), attached())


@pytest.mark.parametrize("first", ["experts", "casting"])
def test_weights_stored_in_eight_bits_leave_experts_as_they_are(first: str) -> None:
    pipeline, experts = tiny_pipeline(), bundle()
    if first == "experts":
        attach(pipeline, experts)
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if first == "casting":
        attach(pipeline, experts)
    mixture = mixture_of(pipeline)
    assert all(torch.equal(value, experts.tensors[name]) for name, value in mixture.state_dict().items())
    twin = tiny_pipeline()
    with torch.no_grad():
        for stored, weight in zip(pipeline.unet.parameters(), twin.unet.parameters(), strict=True):
            weight.copy_(stored.to(weight.dtype))
    attach(twin, experts)
    assert torch.equal(predict(pipeline.unet), predict(twin.unet))


def test_routers_stay_in_fp32_wherever_the_pipeline_goes() -> None:
    pipeline = tiny_pipeline()
    mixture = attach(pipeline, bundle())
    pipeline.to(torch.bfloat16)
    with mixture.recorded_gates() as log:
        said = predict(pipeline.unet, torch.bfloat16)
    assert {gate.dtype for gates in log.values() for gate in gates} == {torch.float32}
    routers = [value for name, value in mixture.state_dict().items() if ".router." in name]
    assert {value.dtype for value in routers} == {torch.float32}
    assert max_error(said, attached()) < 0.1  # some twenty layers, each rounded to 8 bits
