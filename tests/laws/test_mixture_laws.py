"""Laws of a mixture on a network: what attaching, switching, routing and training may and may not change."""

from __future__ import annotations

import copy
import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

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
    tiny_unet,
    unet_inputs,
    zero_routers,
)
from timestep_experts.intervals import Partition
from timestep_experts.mixture import MODES, Mixture, MixtureSpec, RouterForm, Scale, asymmetric, match_targets
from timestep_experts.mixture.fast import FastKernels, Tricks
from timestep_experts.mixture.fast.products import MAX_TERMS
from timestep_experts.mixture.hooks import layers_in
from timestep_experts.mixture.plain import mean_pool

pytestmark = pytest.mark.usefixtures("either_kernels")


SETS = {"8|1": scales(8, 1), "4|8": scales(4, 8), "8|4,1": scales(8, 4, 1), "8|1 rest 1": scales(8, 1, base_gate=1)}
SAME_SIZE_TARGETS = [target for target in TARGETS if target != "downsamplers.0.conv"]
MIXED_T = torch.tensor([3.0, 510.5, 999.0])


@torch.no_grad()
def predict(model, t, num_samples=3, seed=0):
    latents, text = unet_inputs(num_samples, seed)
    return model(latents, t, text).sample


def equipped(unet, spec_scales=SETS["8|1"], mode="route", **options):
    mixture = randomise(Mixture.attach(unet, MixtureSpec(spec_scales, **options), TARGETS))
    mixture.mode = mode
    return mixture


def explicit_delta(layer, scale, x, t):
    """``alpha / r * B A x`` of each sample's owner, by plain torch layers, sample by sample."""
    stack, base = layer.experts[scale.name], layer.base_layer
    deltas = []
    for sample, time in zip(x, t.tolist(), strict=True):
        down, up = (weight[scale.partition.index_of(time)] for weight in (stack.A, stack.B))
        if isinstance(base, nn.Linear):
            delta = functional.linear(functional.linear(sample, down), up)
        else:
            convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.dim()]
            kernel = down.view(-1, layer.geometry.in_features, *base.kernel_size)
            hidden = convolve(sample[None], kernel, None, base.stride, base.padding, base.dilation)
            delta = convolve(hidden, up.view(*up.shape, *[1] * (x.dim() - 2)), groups=base.groups)[0]
        deltas.append(scale.alpha / scale.rank * delta)
    return torch.stack(deltas)


# Attaching and detaching


def test_attach_meets_each_target_exactly_once(unet):
    before = dict(unet.named_modules())
    expected = [name for name in before if any(name == target or name.endswith(f".{target}") for target in TARGETS)]
    assert match_targets(unet, TARGETS) == expected
    mixture = Mixture.attach(unet, MixtureSpec(scales(8, 1)), TARGETS)
    assert list(mixture.layers) == expected
    assert dict(unet.named_modules()) == before  # the network keeps its modules
    assert {layer.name for layer in layers_in(unet)} == set(expected)
    for name, layer in mixture.layers.items():
        assert layer.base_layer is before[name]
    assert match_targets(unet, TARGETS) == []
    assert match_targets(unet, r".*\.(to_q|conv1)") == []


def test_regular_expression_must_match_the_full_name(unet):
    expected = [name for name, _ in unet.named_modules() if name.endswith("attn2.to_k") and name.startswith("down")]
    assert match_targets(unet, r"down_blocks\..*attn2\.to_k") == expected
    assert len(expected) == 1
    assert match_targets(unet, r"attn2\.to_k") == []


def test_detach_restores_everything_to_the_bit(unet):
    def foreign_hook(module, args):
        return None

    unet.register_forward_pre_hook(foreign_hook)
    unet.enable_gradient_checkpointing()
    checkpoint = unet.mid_block._gradient_checkpointing_func
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    modules, output = list(unet.named_modules()), predict(unet, MIXED_T)
    mixture = equipped(unet)
    unet(unet_inputs(3)[0], MIXED_T, unet_inputs(3)[1])
    assert not torch.equal(predict(unet, MIXED_T), output)
    mixture.detach()
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert list(unet.named_modules()) == modules
    assert list(unet._forward_pre_hooks.values()) == [foreign_hook]
    assert unet.mid_block._gradient_checkpointing_func is checkpoint
    assert torch.equal(predict(unet, MIXED_T), output)
    equipped(unet)  # and another can be attached


def test_attach_leaves_the_random_state_alone_and_depends_on_its_seed_only(unet):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Mixture.attach(unet, MixtureSpec(scales(8, 1)), TARGETS, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = Mixture.attach(tiny_unet(), MixtureSpec(scales(8, 1)), TARGETS, seed=1).state_dict()
    other = Mixture.attach(tiny_unet(), MixtureSpec(scales(8, 1)), TARGETS, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key], other[key]) != key.endswith(".A") for key in first)


def test_experts_stand_on_the_device_of_a_base_that_has_only_buffers():
    net = OneLayer(QuantisedLike(6, 5).to("meta"))
    mixture = Mixture.attach(net, MixtureSpec(scales(8, 1)), ["layer"])
    assert {value.device.type for value in mixture.state_dict().values()} == {"meta"}


def test_a_network_keeps_its_own_state(unet):
    before = unet.state_dict()
    equipped(unet)
    assert list(unet.state_dict()) == list(before)
    assert len(list(unet.parameters())) == len(list(tiny_unet().parameters()))


# Nothing said, nothing changed


@pytest.mark.parametrize("name", SETS)
def test_zero_b_changes_no_bit_in_any_mode(unet, name):
    expected, expected_at_one = predict(unet, MIXED_T), predict(unet, 640)
    mixture = equipped(unet, SETS[name])
    for scale in mixture.spec.scales:
        for stack in mixture.stacks(scale.name):
            stack.B.data.zero_()
    for mode in MODES:
        mixture.mode = mode
        assert torch.equal(predict(unet, MIXED_T), expected)
        assert torch.equal(predict(unet, 640), expected_at_one)
    for fostered in ([scale.name] for scale in mixture.spec.scales):
        mixture.foster(*fostered)
        assert torch.equal(predict(unet, MIXED_T), expected)
    mixture.foster(*(scale.name for scale in mixture.spec.scales))
    assert torch.equal(predict(unet, MIXED_T), expected)


def test_mode_off_changes_no_bit_with_any_experts(unet):
    expected = predict(unet, MIXED_T)
    mixture = equipped(unet)
    assert not torch.equal(predict(unet, MIXED_T), expected)
    mixture.mode = "off"
    assert torch.equal(predict(unet, MIXED_T), expected)


@pytest.mark.parametrize("options", [{}, {"positions": "token"}, {"knots": 9}, {"inputs": "t"}], ids=str)
@pytest.mark.parametrize("base_gate", [0, 1])
@pytest.mark.parametrize("numbers", [(8, 1), (4, 8), (8, 4, 1)], ids=str)
def test_zero_router_routes_like_switching(unet, numbers, base_gate, options):
    base = predict(unet, MIXED_T)
    targets = SAME_SIZE_TARGETS if "positions" in options else TARGETS
    spec = MixtureSpec(scales(*numbers, base_gate=base_gate), RouterForm(**options))
    mixture = zero_routers(randomise(Mixture.attach(unet, spec, targets)))
    mixture.mode = "switch"
    switched = predict(unet, MIXED_T)
    mixture.mode = "route"
    assert max_error(switched, base) > 1e-3  # the experts are heard
    # fp32, values near 1: one product over all ranks rounds otherwise than one over the core's
    assert max_error(predict(unet, MIXED_T), switched) <= 2e-6
    routed = predict(unet, 640)
    mixture.mode = "switch"
    assert max_error(predict(unet, 640), routed) <= 2e-6


def test_base_gate_decides_whether_contexts_are_switched_in():
    outputs = {}
    for base_gate in (0, 1):
        unet = tiny_unet()
        mixture = equipped(unet, scales(8, 1, base_gate=base_gate), mode="switch")
        outputs[base_gate] = predict(unet, MIXED_T)
        mixture.foster(*["n8", "n1"][: 1 + base_gate])
        assert torch.equal(predict(unet, MIXED_T), outputs[base_gate])
    assert max_error(outputs[0], outputs[1]) > 1e-3


def test_another_mode_can_be_used_for_a_while(unet):
    mixture = equipped(unet, mode="switch")
    switched = predict(unet, MIXED_T)
    with mixture.using("off"):
        assert torch.equal(predict(unet, MIXED_T), predict(tiny_unet(), MIXED_T))
    assert torch.equal(predict(unet, MIXED_T), switched)
    with pytest.raises(KeyError), mixture.using("off"):
        raise KeyError
    assert mixture.mode == "switch"


# Samples are independent


@pytest.mark.parametrize("mode", ["foster", "switch", "route"])
@pytest.mark.parametrize("name", SETS)
def test_mixed_batch_equals_one_sample_at_a_time(unet, name, mode):
    mixture = equipped(unet, SETS[name], mode)
    if mode == "foster":
        mixture.foster(*(scale.name for scale in mixture.spec.scales))
    latents, text = unet_inputs(5)
    t = torch.tensor([0.0, 124.75, 500.0, 999.0, 1000.0])
    with torch.no_grad():
        batch = unet(latents, t, text).sample
        loop = torch.cat([unet(latents[i, None], t[i], text[i, None]).sample for i in range(5)])
    # fp32 outputs near 1: the products sum in another order for another batch size.
    assert max_error(batch, loop) <= 1e-5
    assert min(max_error(batch[i], batch[j]) for i, j in itertools.combinations(range(5), 2)) > 1e-2


@pytest.mark.parametrize("gate", ["sample", "token"])
def test_gates_of_one_sample_ignore_the_others(unet, gate):
    mixture = randomise(
        Mixture.attach(unet, MixtureSpec(scales(8, 4, 1), RouterForm(positions=gate)), SAME_SIZE_TARGETS)
    )
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    others, other_text = unet_inputs(2, seed=9)
    logs = []
    with torch.no_grad():
        for second, second_text, t in [(latents, text, [300, 20]), (others, other_text, [300, 970])]:
            with mixture.recorded_gates() as log:
                unet(torch.stack([latents[0], second[1]]), torch.tensor(t), torch.stack([text[0], second_text[1]]))
            logs.append(log)
    assert set(logs[0]) == set(logs[1]) == set(mixture.layers)
    for name in mixture.layers:
        (one,), (two,) = logs[0][name], logs[1][name]
        assert max_error(one[0], two[0]) <= 1e-6  # equal sums; room for a kernel that blocks by value
        assert max_error(one[1], two[1]) > 1e-3


@pytest.mark.parametrize("mode", ["foster", "switch", "route"])
def test_one_timestep_is_spread_over_a_guidance_batch(unet, mode):
    mixture = equipped(unet, SETS["8|4,1"], mode)
    if mode == "foster":
        mixture.foster("n8", "n4")
    expected = predict(unet, torch.tensor(640), num_samples=6)
    for t in (
        torch.tensor([640]),
        640,
        torch.tensor(640.0),
        torch.tensor(640).expand(6),
        torch.tensor([640]).expand(6),
    ):
        assert torch.equal(predict(unet, t, num_samples=6), expected)
        assert mixture.timesteps.tolist() == [640] * 6
    # one product for all samples, or one for each: fp32 outputs near 1, summed in another order
    assert max_error(predict(unet, torch.full((6,), 640), num_samples=6), expected) <= 1e-5
    assert max_error(predict(unet, 90, num_samples=6), expected) > 1e-2


def test_call_style_does_not_matter(unet):
    equipped(unet)
    latents, text = unet_inputs(3)
    expected = predict(unet, 640)
    t = torch.tensor(640)
    with torch.no_grad():
        assert torch.equal(unet(latents, timestep=t, encoder_hidden_states=text).sample, expected)
        assert torch.equal(unet(sample=latents, timestep=t, encoder_hidden_states=text).sample, expected)
        assert torch.equal(unet(timestep=t, sample=latents, encoder_hidden_states=text).sample, expected)


class Video(nn.Module):
    """A denoiser whose layers see frames as samples."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample.flatten(0, 1)).unflatten(0, sample.shape[:2])


@pytest.mark.parametrize("mode", ["switch", "route"])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, 2, 1)], ids=["linear", "conv"])
def test_frames_of_a_sample_share_its_timestep(layer, mode):
    net = Video(copy.deepcopy(layer)).eval()
    mixture = randomise(Mixture.attach(net, MixtureSpec(scales(8, 1)), ["layer"]))
    mixture.mode = mode
    video = normal(3, 4, *((7, 6) if isinstance(layer, nn.Linear) else (6, 7, 7)))
    with torch.no_grad():
        batch = net(video, MIXED_T)
        loop = torch.stack(
            [torch.cat([net(video[i, f][None, None], MIXED_T[i])[0] for f in range(4)]) for i in range(3)]
        )
        shared = net(video, MIXED_T[1])
        per_sample = net(video, MIXED_T[1].repeat(3))
    assert max_error(batch, loop) <= 1e-6  # fp32, one layer, values near 1
    assert max_error(shared, per_sample) <= 1e-6


# Formulas


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(carrier=carriers(), t=st.lists(st.integers(0, 8000).map(lambda eighths: eighths / 8), min_size=3, max_size=3))
def test_ungated_core_is_base_plus_the_low_rank_update(carrier, t):
    layer, x, spec = carrier
    t = torch.tensor(t)
    net, mixture = attach_to_layer(layer, spec, "switch")
    mixture.layers["layer"].double()
    with torch.no_grad():
        expected = layer.forward(x) + explicit_delta(mixture.layers["layer"], spec.scales[0], x, t)
        # fp64 but for alpha / r, which is scaled in fp32: 6e-8 of an update below 10.
        assert max_error(net(x, t), expected) <= 2e-6


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(carrier=carriers(), t=st.integers(0, 8000).map(lambda eighths: eighths / 8))
def test_a_shared_timestep_says_what_one_per_sample_says(carrier, t):
    layer, x, spec = carrier
    (core,) = spec.scales
    contexts = [replace(core, name=f"c{n}", partition=Partition.uniform(n), gated=True) for n in (3, 1)]
    spec = MixtureSpec((core, *contexts))
    net, mixture = attach_to_layer(layer, spec, "switch")
    mixture.layers["layer"].double()
    net(x, torch.tensor(999.0))  # timesteps below 1 alone would be taken for shares of noise
    for mode in ("switch", "route"):
        mixture.mode = mode
        with torch.no_grad():
            # fp64 but for alpha / r and the gates, which are fp32: 6e-8 of updates below 100
            assert max_error(net(x, torch.tensor(t)), net(x, torch.full((3,), t))) <= 1e-5


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_over_a_plane_in_both_forms(kernel, dilation, padding, groups):
    layer = nn.Conv2d(4, 6, kernel, 1, padding, dilation, groups).double()
    spec = MixtureSpec(scales(8, rank=4))
    net, mixture = attach_to_layer(layer, spec, "switch")
    mixture.layers["layer"].double()
    x = normal(3, 4, 7, 6, dtype=torch.double).requires_grad_()
    for t in (MIXED_T, torch.tensor(640.0)):
        each = t.expand(3)
        expected = layer.forward(x) + explicit_delta(mixture.layers["layer"], spec.scales[0], x, each)
        y = net(x, t)
        assert max_error(y, expected) <= 1e-12  # fp64; alpha / r is 2, exactly
        pulled = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (y, expected)]
        assert max_error(*pulled) <= 1e-12


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, 1, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("t", [MIXED_T, torch.tensor(640.0)], ids=["mixed", "shared"])
def test_what_others_hold_of_the_base_is_not_overwritten(layer, t):
    x = normal(3, *((7, 6) if isinstance(layer, nn.Linear) else (6, 7, 7)))
    net, _ = attach_to_layer(copy.deepcopy(layer), MixtureSpec(scales(8, 1)), "route")
    with torch.no_grad():
        alone = net(x, t)
        held = []
        for first in (True, False):  # who comes after the experts sees what the layer gives
            handle = net.layer.register_forward_hook(lambda *call: held.append(call[-1]), prepend=first)
            assert torch.equal(net(x, t), alone)
            assert torch.equal(held[-1], layer(x) if first else alone)
            handle.remove()
        held.clear()
        handle = register_module_forward_hook(lambda *call: held.append(call[-1]))
        assert torch.equal(net(x, t), alone)
        handle.remove()
        assert torch.equal(held[0], layer(x))

        own_forward = net.layer.forward
        net.layer.forward = lambda x: held.append(own_forward(x)) or held[-1]
        assert torch.equal(net(x, t), alone)
        assert torch.equal(held[-1], layer(x))
        del net.layer.forward

        class Keeping(type(layer)):
            def forward(self, x):
                self.kept = super().forward(x)
                return self.kept

        net.layer.__class__ = Keeping
        assert torch.equal(net(x, t), alone)
        assert torch.equal(net.layer.kept, layer(x))


ROUTED_LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 7, 6)),
    "vector": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, groups=2), (3, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), (3, 6, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1, groups=2), (3, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3, padding=1), (3, 6, 2, 4, 3)),
}


def positions_last_to_middle(x, layer):
    """``(B, N, features)``: tokens or pixels side by side."""
    return x.reshape(len(x), -1, x.shape[-1]) if isinstance(layer, nn.Linear) else x.flatten(2).transpose(1, 2)


def explicit_gates(router, z, t, spec):
    """``F z + bias + E[floor t]`` for z ``(B, N, k)``: ``(B, N, m)`` if gates are per token, else ``(B, m)``."""
    z = z.double().numpy() if spec.router.positions == "token" else z.double().mean(1).numpy()
    gates = np.zeros((*z.shape[:-1], len(spec.gated_scales)))
    if spec.router.inputs != "t":
        gates += z @ router.F.detach().double().numpy().T + router.bias.detach().double().numpy()
    if spec.router.inputs != "z":
        table = router.E.detach().double().numpy()
        if spec.router.knots is None:
            timed = table[np.minimum(np.floor(t.numpy()).astype(int), len(table) - 1)]
        else:
            knots = np.linspace(0, 1000, spec.router.knots)
            timed = np.stack([np.interp(t.numpy(), knots, column) for column in table.T], -1)
        gates += timed[:, None] if spec.router.positions == "token" else timed
    return torch.from_numpy(gates)


@pytest.mark.parametrize("knots", [None, 2, 9], ids=["table", "line", "smooth"])
@pytest.mark.parametrize("gate", ["sample", "token"])
@pytest.mark.parametrize("router_input", ["z_and_t", "z", "t"])
@pytest.mark.parametrize("kind", ROUTED_LAYERS)
def test_route_is_base_plus_core_plus_gated_contexts(kind, router_input, gate, knots):
    make, shape = ROUTED_LAYERS[kind]
    knots = None if router_input == "z" else knots  # it has no table
    spec = MixtureSpec(scales(8, 4, 1, base_gate=0.5), RouterForm(inputs=router_input, positions=gate, knots=knots))
    net, mixture = attach_to_layer(make(), spec, "route")
    layer = mixture.layers["layer"]
    assert (layer.router.F is None) == (router_input == "t")
    assert (layer.router.E is None) == (router_input == "z")
    x, t = normal(*shape), torch.tensor([0.75, 437.25, 1000.0])
    with torch.no_grad():
        with mixture.recorded_gates() as log:
            y = positions_last_to_middle(net(x, t), layer.base_layer)
        gates = explicit_gates(layer.router, positions_last_to_middle(x, layer.base_layer), t, spec)
        (recorded,) = log["layer"]
        # fp32 sums of a handful of numbers near 1
        assert max_error(recorded.expand(gates.shape), gates) <= 1e-6
        deltas = [positions_last_to_middle(explicit_delta(layer, s, x, t), layer.base_layer) for s in spec.scales]
        strengths = (0.5 + gates).view(3, -1, 2)
        contexts = sum(strengths[..., j, None] * deltas[1 + j] for j in range(2))
        expected = positions_last_to_middle(layer.base_layer.forward(x), layer.base_layer) + deltas[0] + contexts
    assert contexts.abs().max() > 1e-2
    assert max_error(y, expected) <= 2e-6  # fp32, values near 1


REAL_LAYERS = {
    "linear": (lambda: nn.Linear(640, 640), (3, 256, 640)),
    "wide linear": (lambda: nn.Linear(3072, 3072), (3, 16, 3072)),
    "pointwise": (lambda: nn.Conv2d(320, 320, 1), (3, 320, 16, 16)),
    "convolution": (lambda: nn.Conv2d(320, 320, 3, padding=1), (3, 320, 16, 16)),
}


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", REAL_LAYERS)
def test_layers_of_real_width_agree_with_a_loop_over_samples_in_double_precision(kind, dtype, tolerance, is_training):
    make, shape = REAL_LAYERS[kind]
    net, mixture = attach_to_layer(make().to(dtype), MixtureSpec(scales(8, 4, 1)), "route")
    mixture.layers["layer"].move_experts(dtype=dtype)
    x, t = normal(*shape).to(dtype), torch.tensor([3.0, 510.5, 999.0])
    with torch.set_grad_enabled(is_training):
        y = net(x, t).double()
    exact, x = copy.deepcopy(net).double(), x.double()
    layer, spec = Mixture.of(exact).layers["layer"].double(), mixture.spec
    gates = explicit_gates(layer.router, positions_last_to_middle(x, layer.base_layer), t, spec)
    with torch.no_grad():
        expected = layer.base_layer.forward(x) + explicit_delta(layer, spec.scales[0], x, t)
        for gate, scale in zip(gates.unbind(1), spec.scales[1:], strict=True):
            expected += gate.view(-1, *[1] * (x.dim() - 1)) * explicit_delta(layer, scale, x, t)
    # bf16 rounds by up to 2^-9: features, strengths, the sum over a kernel, the base's output and ours
    assert max_error(y, expected) <= tolerance * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"positions": "token"}, {"inputs": "t"}], ids=str)
def test_gates_are_recorded_per_sample_though_the_timestep_is_shared(options):
    net, mixture = attach_to_layer(nn.Linear(6, 4), MixtureSpec(scales(8, 4, 1), RouterForm(**options)), "route")
    x = normal(3, 7, 6)
    logs = []
    for t in (torch.tensor(640.0), torch.full((3,), 640.0)):
        with torch.no_grad(), mixture.recorded_gates() as log:
            net(x, t)
        logs.append(log["layer"][0])
    assert logs[0].shape[0] == 3
    assert torch.equal(*logs)


def test_symmetric_mixture_gates_every_scale():
    every = tuple(Scale(f"n{n}", Partition.uniform(n), 3, 3, gated=True) for n in (8, 2))
    net, mixture = attach_to_layer(nn.Linear(6, 4), MixtureSpec(every), "switch")
    layer = mixture.layers["layer"]
    x = normal(3, 7, 6)
    with torch.no_grad():
        base = layer.base_layer.forward(x)
        assert torch.equal(net(x, MIXED_T), base)  # nothing rests above zero, so switching says nothing
        mixture.mode = "route"
        gates = explicit_gates(layer.router, x, MIXED_T, mixture.spec)
        expected = base + sum(gates[:, j, None, None] * explicit_delta(layer, every[j], x, MIXED_T) for j in range(2))
        assert gates.shape == (3, 2)
        assert max_error(net(x, MIXED_T), expected) <= 2e-6  # fp32, values near 1
        assert max_error(expected, base) > 1e-2


def test_asymmetric_makes_the_smallest_interval_the_core():
    given_scales = [Scale(f"n{n}", Partition.uniform(n), 4, 4, gated=n == 8) for n in (1, 8, 4)]
    assert [(s.name, s.gated) for s in asymmetric(given_scales)] == [("n1", True), ("n8", False), ("n4", True)]


def test_strata_cross_no_boundary_of_any_scale():
    assert MixtureSpec(scales(8, 6, 1)).strata == Partition.uniform(8).refine(Partition.uniform(6))


@pytest.mark.parametrize("shrinking", [{"stride": 2, "padding": 1}, {"padding": 0}], ids=str)
def test_token_gates_are_refused_where_a_convolution_changes_the_number_of_positions(shrinking):
    spec = MixtureSpec(scales(8, 1, base_gate=1), router=RouterForm(positions="token"))
    with pytest.raises(ValueError, match=r"layer: a gate per position needs a layer that keeps positions"):
        attach_to_layer(nn.Conv2d(6, 4, 3, **shrinking), spec)


class QuantisedLike(nn.Module):
    """A linear layer that keeps whole numbers and a scale, and has neither ``weight`` nor parameters."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = normal(out_features, in_features, seed=3)
        self.register_buffer("scale", weight.abs().max() / 127)
        self.register_buffer("quantised", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return functional.linear(x, self.quantised.to(x.dtype) * self.scale.to(x.dtype))


def test_base_that_is_only_linear_like_carries_experts():
    net, mixture = attach_to_layer(QuantisedLike(6, 4), MixtureSpec(scales(8)), "switch")
    layer, x = mixture.layers["layer"], normal(3, 7, 6)
    with torch.no_grad():
        base = layer.base_layer.forward(x)
        stack, owners = layer.experts["n8"], [0, 4, 7]
        expected = base + 2 * torch.einsum("bdr,brk,bnk->bnd", stack.B[owners], stack.A[owners], x)
        assert max_error(net(x, MIXED_T), expected) <= 2e-6  # fp32, values near 1
        assert max_error(expected, base) > 1e-2
    assert list(net.state_dict()) == ["layer.scale", "layer.quantised"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_channels_last_before_or_after_attaching_changes_only_the_layout(unet, moment):
    reference = tiny_unet()
    equipped(reference)
    if moment == "before":
        unet.to(memory_format=torch.channels_last)
    equipped(unet)
    if moment == "after":
        unet.to(memory_format=torch.channels_last)
    latents, text = unet_inputs(3)
    with torch.no_grad():
        y = unet(latents.to(memory_format=torch.channels_last), MIXED_T, text).sample
    # fp32 values near 1: other kernels, other order of sums
    assert max_error(y, predict(reference, MIXED_T)) <= 1e-5


def test_a_network_without_timesteps_is_bound_by_hand():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, features):
            return self.layer(features)

    encoder = Encoder().eval()
    mixture = randomise(Mixture.attach(encoder, MixtureSpec(scales(8, 1)), ["layer"]))
    mixture.mode = "route"
    layer = mixture.layers["layer"]
    x = normal(3, 7, 6)
    with torch.no_grad():
        for t in (MIXED_T, MIXED_T.flip(0)):
            with mixture.at(t):
                with mixture.at(torch.zeros(3)):
                    pass
                gate = explicit_gates(layer.router, x, t, mixture.spec)[:, :, None]
                core, context = (explicit_delta(layer, scale, x, t) for scale in mixture.spec.scales)
                assert max_error(encoder(x), layer.base_layer.forward(x) + core + gate * context) <= 2e-6
    with pytest.raises(RuntimeError, match=r"Mixture\.at"):
        encoder(x)


# Training


def gradients(mixture):
    return {
        f"{name}.{key}": parameter.grad
        for name, layer in mixture.layers.items()
        for key, parameter in layer.named_parameters()
    }


def taken_gradients(network, mixture):
    """The gradients of all parameters, the base's first, which then have none."""
    parameters = [p for p in (*network.parameters(), *mixture.parameters()) if p.grad is not None]
    found = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("mode", ["foster", "switch", "route"])
def test_only_the_owning_expert_gets_a_gradient(unet, mode):
    mixture = equipped(unet, SETS["8|4,1"], mode)
    if mode == "foster":
        mixture.foster("n8", "n4")
    t = torch.tensor([130.0, 130.5, 999.0])
    latents, text = unet_inputs(3)
    unet(latents, t, text).sample.square().mean().backward()
    heard = {"foster": {"n8", "n4"}, "switch": {"n8"}, "route": {"n8", "n4", "n1"}}[mode]
    owners = {"n8": {1, 7}, "n4": {0, 3}, "n1": {0}}
    for key, gradient in gradients(mixture).items():
        kind = key.split(".experts.")[-1].split(".")[0]
        if kind in owners:
            moved = set() if gradient is None else set(gradient.flatten(1).any(1).nonzero().flatten().tolist())
            assert moved == (owners[kind] if kind in heard else set()), key
        elif key.endswith(".E") and mode == "route":
            assert set(gradient.any(1).nonzero().flatten().tolist()) == {130, 999}, key
        elif mode != "route":
            assert gradient is None, key


def test_a_shared_timestep_trains_like_one_per_sample(unet):
    mixture = equipped(unet, SETS["8|4,1"])
    latents, text = unet_inputs(3)
    found = []
    for t in (torch.tensor(640.0), torch.full((3,), 640.0)):
        for parameter in mixture.parameters():
            parameter.grad = None
        unet(latents, t, text).sample.square().mean().backward()
        found.append({key: gradient.clone() for key, gradient in gradients(mixture).items()})
    for key, gradient in found[0].items():
        assert max_error(gradient, found[1][key]) <= 1e-5 * max(1, gradient.abs().max().item()), key


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_checkpointed_gradients_are_those_without_checkpoints(mode):
    def train(with_checkpoints):
        unet = tiny_unet().train()
        mixture = equipped(unet, mode=mode)
        if with_checkpoints:
            unet.enable_gradient_checkpointing()
        latents, text = unet_inputs(2)
        loss = 0
        for t in ([20, 400], [700, 980]):  # both are recomputed after the second has bound its timesteps
            loss = loss + unet(latents, torch.tensor(t), text).sample.square().sum()
        loss.backward()
        return gradients(mixture)

    plain, checkpointed = train(False), train(True)
    for key, gradient in plain.items():
        assert (gradient is None) == (checkpointed[key] is None)
        if gradient is not None:
            # the same fp32 kernels on the same numbers: only the order of accumulation is free
            assert max_error(checkpointed[key], gradient) <= 1e-5 * max(1, gradient.abs().max().item()), key
    core = [gradient for key, gradient in plain.items() if ".experts.n8." in key]
    assert all(set(g.flatten(1).any(1).nonzero().flatten().tolist()) == {0, 3, 5, 7} for g in core)


def test_dropout_acts_in_training_only_and_on_the_experts_only():
    spec = MixtureSpec(scales(8, 1), dropout=0.5)
    net, mixture = attach_to_layer(nn.Linear(6, 4), spec, "route")
    without, _ = attach_to_layer(nn.Linear(6, 4), MixtureSpec(scales(8, 1)), "route")
    without.load_state_dict(net.state_dict())
    x = normal(3, 7, 6)
    with torch.no_grad():
        assert torch.equal(net(x, MIXED_T), without(x, MIXED_T))
        net.train()
        torch.manual_seed(0)
        with mixture.recorded_gates() as log:
            first, second = net(x, MIXED_T), net(x, MIXED_T)
        assert torch.equal(*log["layer"])
        assert max_error(first, second) > 1e-2
        draws = torch.stack([net(x, MIXED_T) for _ in range(1000)])
        deviation = (draws.mean(0) - without(x, MIXED_T)).abs() / (draws.std(0) / 1000**0.5)
        assert deviation.max() < 5  # the mean is kept: within five standard errors
        for stack in mixture.stacks("n8") + mixture.stacks("n1"):
            stack.B.zero_()
        assert torch.equal(net(x, MIXED_T), mixture.layers["layer"].base_layer.forward(x))


# Precision, copies, compilation


@pytest.mark.parametrize("experts_too", [True, False], ids=["all", "base only"])
def test_bfloat16_stays_close(unet, experts_too):
    if not experts_too:
        unet.to(torch.bfloat16)
    mixture = equipped(unet)
    reference = tiny_unet()
    equipped(reference)
    expected = predict(reference, MIXED_T)
    effect = max_error(expected, predict(tiny_unet(), MIXED_T))
    if experts_too:
        unet.to(torch.bfloat16)
        for layer in mixture.layers.values():
            layer.to(torch.bfloat16)
    assert {p.dtype for p in mixture.state_dict().values()} == {torch.bfloat16 if experts_too else torch.float32}
    latents, text = unet_inputs(3)
    with torch.no_grad(), mixture.recorded_gates() as log:
        y = unet(latents.bfloat16(), MIXED_T, text.bfloat16()).sample
    assert y.dtype == torch.bfloat16
    assert {gate.dtype for gates in log.values() for gate in gates} == {torch.float32}
    error = max_error(y, expected)
    assert error < 0.1  # some twenty layers in a row, each rounded to 8 bits: .004 of values up to 2
    assert error < effect / 3


def test_autocast_stays_close_and_trains(unet):
    mixture = equipped(unet)
    expected = predict(unet, MIXED_T)
    effect = max_error(expected, predict(tiny_unet(), MIXED_T))
    latents, text = unet_inputs(3)
    with torch.autocast("cpu", torch.bfloat16), mixture.recorded_gates() as log:
        y = unet(latents, MIXED_T, text).sample
        loss = y.float().square().mean()
    assert y.dtype == torch.bfloat16
    assert {gate.dtype for gates in log.values() for gate in gates} == {torch.float32}
    assert max_error(y, expected) < min(0.1, effect / 3)  # as in bfloat16
    loss.backward()
    for key, gradient in gradients(mixture).items():
        assert gradient.dtype == torch.float32, key
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["sample", "token"])
def test_autocast_rounds_no_gate(gate, dtype):
    net, mixture = attach_to_layer(nn.Linear(6, 4), MixtureSpec(scales(8, 1), RouterForm(positions=gate)), "route")
    x = normal(3, 7, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), mixture.recorded_gates() as log:
        assert net(x, MIXED_T).dtype == torch.bfloat16
    expected = explicit_gates(mixture.layers["layer"].router, x, MIXED_T, mixture.spec)
    assert max_error(log["layer"][0], expected) <= 1e-6  # fp32 sums of a handful of numbers near 1


def test_deep_copy_is_independent(unet):
    mixture = equipped(unet)
    unet.enable_gradient_checkpointing()
    unet(unet_inputs(3)[0], MIXED_T, unet_inputs(3)[1])
    expected = predict(unet, MIXED_T)
    twin = copy.deepcopy(unet)
    copied = Mixture.of(twin)
    assert list(copied.layers) == list(mixture.layers)
    assert torch.equal(predict(twin, MIXED_T), expected)
    randomise(copied, seed=1)
    copied.mode = "switch"
    changed = predict(twin, MIXED_T.flip(0))
    assert mixture.mode == "route"
    assert torch.equal(predict(unet, MIXED_T), expected)
    mixture.mode = "off"
    assert torch.equal(predict(twin, MIXED_T.flip(0)), changed)
    copied.detach()
    assert match_targets(unet, TARGETS) == []
    assert torch.equal(predict(twin, MIXED_T), predict(tiny_unet(), MIXED_T))


def graphs_after_warm_up(net, inputs, spread):
    """How often the compiled network is compiled again once two timesteps have been seen; its outputs are checked."""
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    for t in (3, 990):  # the second call lets a number become symbolic
        compiled(inputs[0], spread(t), *inputs[1:])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for t in (130, 400, 612, 999, 0):
        y = compiled(inputs[0], spread(t), *inputs[1:])
        # fp32, values near 1: the graph adds products term by term
        assert max_error(y, net(inputs[0], spread(t), *inputs[1:])) <= 2e-6
    return counters["stats"]["unique_graphs"] - graphs


class Tensors(nn.Module):
    """A denoiser that returns a tensor."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text).sample


@pytest.mark.parametrize("form", ["scalar", "per sample while training"])
def test_compiled_unet_is_not_recompiled_as_t_changes(unet, form):
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 4, 1)), ["to_q", "conv1", "downsamplers.0.conv"]))
    mixture.mode = "route"
    spread = torch.tensor if form == "scalar" else lambda t: torch.tensor([t, 999 - t])
    with torch.set_grad_enabled(form != "scalar"):
        assert graphs_after_warm_up(Tensors(unet), unet_inputs(2), spread) == 0


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_a_schedule_is_compiled_at_its_first_step_with_one_break_at_most(unet, mode):
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 4, 1, base_gate=0.5)), ["to_q", "to_k", "conv1"]))
    mixture.mode = mode
    graphs, later, breaks = count_graphs(unet)
    assert (1 <= graphs <= 2, later, breaks <= 1) == (True, 0, True)  # the hook is a graph of its own


@pytest.mark.parametrize(
    "spread",
    [torch.tensor, lambda t: torch.tensor([t, 999 - t]), int, float],
    ids=["scalar", "per sample", "int", "float"],
)
def test_compiled_layer_is_not_recompiled_as_t_changes(spread):
    net, _ = attach_to_layer(nn.Linear(6, 4), MixtureSpec(scales(8, 4, 1)), "route")
    with torch.no_grad():
        assert graphs_after_warm_up(net, [normal(2, 7, 6)], spread) == 0


@pytest.mark.parametrize("is_shared", [True, False], ids=["one t", "mixed t"])
@pytest.mark.parametrize("kind", ROUTED_LAYERS)
def test_what_is_written_for_compilers_says_the_same(kind, is_shared, monkeypatch):
    make, shape = ROUTED_LAYERS[kind]
    net, mixture = attach_to_layer(make(), MixtureSpec(scales(8, 4, rank=2)), "route")
    assert MAX_TERMS >= 4  # two scales of rank 2: products are written term by term
    t = torch.tensor(437.0) if is_shared else torch.tensor([0.75, 437.25, 1000.0])
    found = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda said=is_compiling: said)
        x = normal(*shape).requires_grad_()
        y = net(x, t)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *taken_gradients(net, mixture)])
    assert all(max_error(a, b) <= 2e-6 for a, b in zip(*found, strict=True))  # fp32, values near 1


# State


def test_state_survives_the_round_trip(unet):
    mixture = equipped(unet)
    expected = predict(unet, MIXED_T)
    state = {key: value.clone() for key, value in mixture.state_dict().items()}
    names = [f"experts.{scale}.{part}" for scale in ("n8", "n1") for part in "AB"] + [
        f"router.{part}" for part in ("F", "bias", "E")
    ]
    assert set(state) == {f"{layer}.{name}" for layer in mixture.layers for name in names}
    other = tiny_unet()
    loaded = randomise(Mixture.attach(other, MixtureSpec(scales(8, 1)), TARGETS), seed=7)
    loaded.mode = "route"
    assert not torch.equal(predict(other, MIXED_T), expected)
    loaded.load_state_dict(dict(reversed(state.items())))
    assert torch.equal(predict(other, MIXED_T), expected)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    randomise(mixture, seed=8)
    assert torch.equal(predict(other, MIXED_T), expected)  # values were copied, not shared


def test_router_parameters_are_the_maps_and_the_tables(unet):
    mixture = equipped(unet)
    maps, tables = mixture.router_parameters()
    assert len(maps) == 2 * len(mixture.layers)
    assert [tuple(table.shape) for table in tables] == [(1000, 1)] * len(mixture.layers)
    own = {id(p) for layer in mixture.layers.values() for p in layer.router.parameters()}
    assert {id(p) for p in [*maps, *tables]} == own


# The fast arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "channels_first"), [((2, 6), False), ((2, 5, 6), False), ((2, 3, 4, 6), False), ((2, 6, 3, 4), True)]
)
def test_inputs_are_averaged_over_positions_in_fp32(shape, channels_first, dtype):
    x = normal(*shape).to(dtype)
    middle = tuple(range(2, len(shape))) if channels_first else tuple(range(1, len(shape) - 1))
    averaged = mean_pool(x, channels_first)
    assert averaged.dtype == torch.float32
    assert averaged.shape == (2, 6)
    assert max_error(averaged, x.float().mean(middle) if middle else x.float()) <= 1e-6


def test_an_input_is_averaged_as_it_is_now(unet):
    """A prompt is overwritten behind PyTorch's back, as other libraries and shared memory do."""
    equipped(unet)
    latents, text = unet_inputs(2)
    with torch.no_grad():
        unet(latents, 640, text)
        text.data.copy_(normal(*text.shape) + 3)
        again = unet(latents, 640, text).sample
        assert torch.equal(again, unet(latents, 640, text.clone()).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [[500.0], [100.0, 900.0]], ids=["one t", "mixed t"])
def test_half_precision_convolutions_are_as_exact_as_two_convolutions(dtype, t):
    """A layer of experts beside the same two convolutions in half precision, both against double precision."""
    x = normal(2, 64, 16, 16)
    base = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False)
    torch.nn.init.zeros_(base.weight)  # what is left is the experts' part alone
    net = torch.nn.ModuleDict({"conv": base})
    mixture = randomise(Mixture.attach(net, MixtureSpec(scales(2)), ["conv"]))
    mixture.mode = "switch"
    (scale,), stack = mixture.spec.scales, mixture.layers["conv"].experts["n2"]
    owners = scale.partition.index_of(torch.tensor(t)).expand(2)

    def two_convolutions(kind):
        def of(sample, owner):
            down, up = stack.A[owner].reshape(-1, 64, 3, 3), stack.B[owner][..., None, None]
            hidden = torch.nn.functional.conv2d(sample[None].to(dtype).to(kind), down.to(dtype).to(kind), padding=1)
            return scale.scaling * torch.nn.functional.conv2d(hidden, up.to(dtype).to(kind))

        return torch.cat([of(sample, owner) for sample, owner in zip(x, owners, strict=True)])

    with torch.no_grad():
        exact, rival = two_convolutions(torch.double), two_convolutions(dtype)
        base.to(dtype)
        mixture.layers["conv"].move_experts(dtype=dtype)
        with mixture.at(torch.tensor(t)):
            ours = net.conv(x.to(dtype))
    error, limit = ((y.double() - exact).abs().mean() for y in (ours, rival))
    assert error <= 1.1 * limit  # the rounding of hidden features is shared, that of the output is another one


@pytest.mark.parametrize("trick", [item.name for item in fields(Tricks)])
@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
def test_a_trick_that_is_left_out_changes_no_number(trick, is_training):
    found = []
    for kernels in (FastKernels(), FastKernels(Tricks(**{trick: False}))):
        unet = tiny_unet()
        mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 4, 1)), TARGETS, kernels=kernels))
        mixture.mode = "route"
        latents, text = unet_inputs(3)
        with torch.set_grad_enabled(is_training):
            for t in (640, MIXED_T):
                y = unet(latents, t, text).sample
                found.append([y.detach()])
                if is_training:
                    y.square().mean().backward()
                    found[-1] += taken_gradients(unet, mixture)
    for with_it, without in zip(found[:2], found[2:], strict=True):
        assert len(with_it) == len(without)
        for a, b in zip(with_it, without, strict=True):
            assert max_error(a, b) <= 1e-5 * max(1, b.abs().max().item())  # fp32, summed in another order
