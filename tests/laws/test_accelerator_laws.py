"""On an accelerator a mixture says what it says on the CPU: eager, in CUDA graphs, fused, and in training."""

from __future__ import annotations

import pytest
import torch

from conftest import TARGETS, max_error, randomise, scales, tiny_unet, unet_inputs
from timestep_experts.mixture import Mixture, MixtureSpec, fuse, unfuse

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("either_kernels", "exact_products"),
]

TIMES = {"one t": torch.tensor(640.0), "mixed t": torch.tensor([3.0, 640.0, 999.0])}


@pytest.fixture
def exact_products():
    """TF32 rounds factors to 10 bits; these laws are about fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


def equipped(mode, device="cuda"):
    """A UNet with random experts, the same on every device."""
    unet = tiny_unet().to(device)
    mixture = Mixture.attach(unet, MixtureSpec(scales(8, 4, 1)), TARGETS)
    mixture.load_state_dict(randomise(Mixture.attach(tiny_unet(), MixtureSpec(scales(8, 4, 1)), TARGETS)).state_dict())
    mixture.mode = mode
    if mode == "foster":
        mixture.foster("n8", "n4")
    return unet, mixture


def predict(unet, t, device="cuda"):
    latents, text = unet_inputs(3)
    return unet(latents.to(device), t.to(device), text.to(device)).sample


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("mode", ["off", "foster", "switch", "route"])
def test_an_accelerator_predicts_and_learns_what_the_cpu_does(mode, times):
    found = {}
    for device in ("cpu", "cuda"):
        unet, _ = equipped(mode, device)
        y = predict(unet, TIMES[times], device)
        y.square().mean().backward()
        gradients = {name: p.grad.cpu() for name, p in unet.named_parameters() if p.grad is not None}
        found[device] = y.detach().cpu(), gradients
    assert max_error(found["cuda"][0], found["cpu"][0]) <= 2e-5  # fp32 through twenty layers, values near 1
    assert found["cuda"][1].keys() == found["cpu"][1].keys()
    for name, gradient in found["cpu"][1].items():
        assert max_error(found["cuda"][1][name], gradient) <= 1e-4 * max(1, gradient.abs().max().item()), name


@pytest.mark.parametrize("spread", [torch.tensor, lambda t: torch.tensor([t, 999 - t, 500])], ids=["one t", "mixed t"])
@pytest.mark.parametrize("mode", ["switch", "route"])
def test_cuda_graphs_follow_a_schedule(mode, spread):
    """A graph that was recorded at one t may not keep the experts of that t."""
    torch._dynamo.reset()
    unet, _ = equipped(mode)
    compiled = torch.compile(unet, mode="reduce-overhead")
    with torch.no_grad():
        for t in (999, 640, 631, 130, 1):
            y = predict(compiled, spread(t)).clone()
            assert max_error(y, predict(unet, spread(t))) <= 2e-5, t


def test_fusing_on_an_accelerator_restores_the_weights_to_the_bit():
    unet, mixture = equipped("switch")
    before = {name: p.clone() for name, p in unet.named_parameters()}
    with torch.no_grad():
        expected = predict(unet, TIMES["one t"])
        fuse(mixture)
        assert max_error(predict(unet, TIMES["one t"]), expected) <= 2e-5
        predict(unet, torch.tensor(20.0))  # another interval: the experts in the weights are exchanged
        unfuse(mixture)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())


def test_moving_the_base_moves_its_experts():
    unet, mixture = equipped("route", "cpu")
    unet.to("cuda")
    assert {value.device.type for value in mixture.state_dict().values()} == {"cuda"}
    assert max_error(predict(unet, TIMES["mixed t"]), predict(equipped("route")[0], TIMES["mixed t"])) == 0
