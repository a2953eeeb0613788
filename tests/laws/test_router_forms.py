"""Laws of the routers' forms: gates per rank, latents, knots, intervals, unit size; over both arithmetics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TARGETS, attach_to_layer, max_error, normal, randomise, scales, tiny_unet, unet_inputs
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale, fuse, unfuse
from timestep_experts.mixture.fast import FastKernels
from timestep_experts.mixture.plain import latent_rms
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.router_form import TimestepIndex
from timestep_experts.weights.switchable import to_switchable

pytestmark = pytest.mark.usefixtures("either_kernels")

MIXED_T = torch.tensor([3.0, 510.5, 999.0])
FORMS = [
    RouterForm("rank", "t", knots=9, unit_rms=True),
    RouterForm("rank", "z_and_t", "latent_rms", knots=9, unit_rms=True),
    RouterForm("rank", "z", "latent_rms"),
    RouterForm("rank", "z_and_t"),
    RouterForm("rank", "t", intervals=Partition.uniform(4)),
    RouterForm("expert", "z_and_t", "latent_rms", knots=(0, 100, 1000)),
    RouterForm("rank", "z_and_t", "latent_rms", positions="token"),
    RouterForm("expert", "t", unit_rms=True),
]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 7, 6)),
    "vector": (lambda: nn.Linear(6, 4), (3, 6)),
    "grouped": (lambda: nn.Conv1d(6, 4, 3, padding=1, groups=2), (3, 6, 9)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1, stride=2), (3, 6, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 4)),
}


def rank_scales(*counts, base_gate=1.0, rank=4):
    return tuple(Scale(f"n{n}", Partition.uniform(n), rank, 8, gated=True, base_gate=base_gate) for n in counts)


@torch.no_grad()
def predict(model, t, num_samples=3):
    latents, text = unet_inputs(num_samples)
    return model(latents, t, text).sample


def features_last(x, layer):
    return x.reshape(len(x), -1, x.shape[-1]) if isinstance(layer, nn.Linear) else x.flatten(2).transpose(1, 2)


def latents_of(layer, scale, x, t):
    """A x of each sample's owner by plain layers, ``(B, N, r)``."""
    stack, base = layer.experts[scale.name], layer.base_layer
    found = []
    for sample, time in zip(x, t.tolist(), strict=True):
        down = stack.A[scale.partition.index_of(time)]
        if isinstance(base, nn.Linear):
            found.append((sample @ down.T).reshape(-1, len(down)))
            continue
        convolve = {2: nn.functional.conv1d, 3: nn.functional.conv2d}[sample.dim()]
        hidden = convolve(sample[None], down.view(-1, 6, *base.kernel_size), None, base.stride, base.padding)
        found.append(hidden[0].flatten(1).T)
    return torch.stack(found)


def written_out(layer, spec, x, t):
    """What the experts add, with numpy and a loop over samples and ranks."""
    form, gated = spec.router, spec.gated_scales
    latents = {scale.name: latents_of(layer, scale, x, t) for scale in spec.scales}
    heard = torch.cat([latents[scale.name] for scale in gated], 2).double().numpy()
    if form.features == "latent_rms":
        power = heard**2 if form.positions == "token" else (heard**2).mean(1, keepdims=True)
        z = np.sqrt(power) / np.sqrt(power).mean(-1, keepdims=True) - 1
    else:
        z = features_last(x, layer.base_layer).double().numpy().mean(1, keepdims=True)
    router, gates = layer.router, 0.0
    if router.F is not None:
        gates = z @ router.F.detach().double().numpy().T
        gates = gates if router.bias is None else gates + router.bias.detach().double().numpy()
    if router.E is not None:
        table = router.E.detach().double().numpy()
        if form.unit_rms:
            whole = table + router.base.double().numpy()
            table = whole / np.sqrt((whole**2).mean(0)) - router.base.double().numpy()
        places = form.places(1000)
        if places:
            rows = np.stack([np.interp(t.numpy(), places, column) for column in table.T], -1)
        elif form.intervals is not None:
            rows = table[[form.intervals.index_of(value) for value in t.tolist()]]
        else:
            rows = table[np.minimum(np.floor(t.numpy()).astype(int), 999)]
        gates = gates + rows[:, None]
    gates, start, total = gates + router.base.double().numpy(), 0, 0.0
    for scale in spec.scales:
        up = layer.experts[scale.name].B.detach().double()
        own = np.ones((1, 1, 1))
        if scale.gated:
            width = scale.rank if form.gates == "rank" else 1
            own, start = gates[..., start : start + width], start + width
        hidden = torch.from_numpy(own) * latents[scale.name].double() * scale.alpha / scale.rank
        groups = getattr(layer.base_layer, "groups", 1)
        added = []
        for row, time in zip(hidden, t.tolist(), strict=True):
            b = up[scale.partition.index_of(time)]
            parts = zip(b.chunk(groups, 0), row.chunk(groups, 1), strict=True)
            added.append(torch.cat([part @ b_part.T for b_part, part in parts], 1))
        total = total + torch.stack(added)
    return total


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_formula_is_what_it_says(kind, form):
    make, shape = LAYERS[kind]
    spec = MixtureSpec((*scales(8), *rank_scales(4, 1)) if form.gates == "expert" else rank_scales(8, 1), form)
    net, mixture = attach_to_layer(make(), spec, "route")
    layer, x, t = mixture.layers["layer"], normal(*shape), torch.tensor([0.75, 437.25, 998.0])
    with torch.no_grad():
        added = features_last(net(x, t), layer.base_layer) - features_last(
            layer.base_layer.forward(x), layer.base_layer
        )
        expected = written_out(layer, spec, x, t)
    assert expected.abs().max() > 1e-2
    assert max_error(added, expected) <= 5e-6 * max(1, expected.abs().max())  # fp32 sums of numbers near 1


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gates_at_their_start_change_nothing(form):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(rank_scales(4, 1), form), TARGETS))
    for layer in mixture.layers.values():
        for parameter in layer.router.parameters():
            parameter.data.zero_()
    mixture.mode = "switch"
    switched = predict(unet, MIXED_T)
    mixture.mode = "route"
    assert max_error(predict(unet, MIXED_T), switched) <= 2e-6  # fp32, values near 1
    mixture.mode = "off"
    assert max_error(predict(unet, MIXED_T), switched) > 1e-3  # the experts are heard


@pytest.mark.parametrize("kind", ["linear", "pointwise", "conv"])
@pytest.mark.parametrize("inputs", ["z_and_t", "t", "z"])
def test_gates_per_rank_are_those_of_as_many_rank_one_experts(kind, inputs):
    make, shape = LAYERS[kind]
    rank, knots = 3, None if inputs == "z" else 5
    whole, one_scale = attach_to_layer(
        make(), MixtureSpec(rank_scales(4, rank=rank), RouterForm("rank", inputs, knots=knots))
    )
    ranks = tuple(Scale(f"r{i}", Partition.uniform(4), 1, 8 / rank, gated=True, base_gate=1.0) for i in range(rank))
    parts, many = attach_to_layer(make(), MixtureSpec(ranks, RouterForm("expert", inputs, knots=knots)))
    parts.layer.load_state_dict(whole.layer.state_dict())
    source, target = one_scale.layers["layer"], many.layers["layer"]
    with torch.no_grad():
        for i in range(rank):
            target.experts[f"r{i}"].A.copy_(source.experts["n4"].A[:, i : i + 1])
            target.experts[f"r{i}"].B.copy_(source.experts["n4"].B[:, :, i : i + 1])
        target.router.load_state_dict(source.router.state_dict())
        one_scale.mode = many.mode = "route"
        x = normal(*shape)
        y = whole(x, MIXED_T)
        assert max_error(parts(x, MIXED_T), y) <= 2e-6 * max(1, y.abs().max())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gates_of_a_sample_do_not_depend_on_the_batch(form):
    net, _ = attach_to_layer(nn.Linear(6, 4), MixtureSpec(rank_scales(4, 1), form), "route")
    x = normal(3, 7, 6)
    with torch.no_grad():
        together = net(x, MIXED_T)
        for row in range(3):
            alone = net(x[row : row + 1], MIXED_T[row : row + 1])
            assert max_error(alone[0], together[row]) <= 2e-6  # fp32, values near 1


class Operators(TorchDispatchMode):
    """How many operators are called."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_tables_of_all_layers_are_read_as_one(either_kernels):
    counts, form = {}, RouterForm("rank", "t", knots=9, unit_rms=True)
    for mode in ("switch", "route"):
        unet = tiny_unet()
        mixture = randomise(Mixture.attach(unet, MixtureSpec(rank_scales(1), form), TARGETS))
        mixture.mode = mode
        with Operators() as operators:
            predict(unet, MIXED_T)
        counts[mode] = operators.count
    per_layer = (counts["route"] - counts["switch"]) / len(mixture.layers)
    # gates take a few operators in each layer; a table by itself would take a dozen more
    assert (per_layer < 8) == (either_kernels is FastKernels)


def test_padding_is_not_heard_in_latents():
    latents, mask = normal(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    q = latent_rms(latents, mask, "sample")
    alone = latent_rms(latents[:1, :3], None, "sample")
    assert max_error(q[:1], alone) <= 1e-6
    changed = latents.clone()
    changed[0, 3:] = 1e3
    assert torch.equal(latent_rms(changed, mask, "sample"), q)


def test_silent_latents_have_no_size_and_a_finite_slope():
    latents = torch.zeros(2, 5, 3, requires_grad=True)
    q = latent_rms(latents, None, "sample")
    assert torch.equal(q, torch.zeros(2, 3))
    q.sum().backward()
    assert latents.grad.isfinite().all()


@pytest.mark.parametrize(
    "form", [RouterForm("rank", "t", knots=9, unit_rms=True), RouterForm("rank", "t", unit_rms=True)]
)
def test_gates_have_unit_size_whatever_their_table_is_multiplied_by(form):
    router = Router(6, rank_scales(1, base_gate=0.5), 1000, form)
    router.E.data = normal(*router.E.shape)
    gates = router.table() + router.base
    assert max_error(gates.square().mean(0), torch.ones(4)) <= 1e-6
    router.E.data = 3 * (router.E.data + 0.5) - 0.5
    assert max_error(router.table() + router.base, gates) <= 2e-6


def test_knots_at_even_places_are_a_number_of_knots():
    t = torch.tensor([-1.0, 0.0, 3.5, 250.0, 999.0, 1000.0, 2000.0])
    table = normal(5, 3)
    by_number = TimestepIndex.of(t, RouterForm(knots=5), 1000).read(table)
    by_place = TimestepIndex.of(t, RouterForm(knots=(0, 250, 500, 750, 1000)), 1000).read(table)
    assert max_error(by_number, by_place) <= 1e-6
    uneven = TimestepIndex.of(t, RouterForm(knots=(0, 10, 700, 900, 1000)), 1000).read(table)
    expected = np.stack([np.interp(t.numpy(), (0, 10, 700, 900, 1000), column) for column in table.T.numpy()], -1)
    assert max_error(uneven, torch.from_numpy(expected)) <= 1e-6


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], RouterForm("expert", "t")], ids=str)
def test_gates_of_t_alone_stand_in_the_weights(form):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec((*scales(8), *rank_scales(4, 1)), form), TARGETS))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    mixture.mode = "route"
    times = (999.0, 640.25, 640.0, 3.0)
    beside = [predict(unet, t) for t in times]
    mixed = predict(unet, MIXED_T)
    fuse(mixture)
    # fp32, values near 1: the sum stands in the weight, which rounds otherwise
    assert all(max_error(predict(unet, t), y) <= 1e-5 for t, y in zip(times, beside, strict=True))
    assert max_error(predict(unet, MIXED_T), mixed) <= 1e-5
    unfuse(mixture)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def bundle_of(unet, spec):
    mixture = randomise(Mixture.attach(unet, spec, TARGETS))
    tensors = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    made = Bundle(spec, tuple(mixture.layers), tensors, "route", "a base", type(unet).__name__, {})
    mixture.detach()
    return made


@pytest.mark.parametrize("gates", ["rank", "expert"])
def test_a_table_on_intervals_is_as_many_loras(gates):
    unet = tiny_unet()
    form = RouterForm(gates, "t", intervals=Partition((0, 100, 700, 1000)), unit_rms=True)
    made = bundle_of(unet, MixtureSpec((*scales(8), *rank_scales(1)), form))
    pipeline = type("Pipeline", (), {"unet": unet, "components": {"unet": unet}})()
    times = (0.0, 99.5, 100.0, 130.0, 699.0, 999.0)
    attach(pipeline, made)
    routed = [predict(unet, t) for t in times]
    detach(pipeline)
    found = to_switchable(made)
    assert found.error == 0
    assert found.bundle.mode == "switch"
    assert found.partition.boundaries == (0, 100, 125, 250, 375, 500, 625, 700, 750, 875, 1000)
    attach(pipeline, found.bundle)
    assert all(max_error(predict(unet, t), y) <= 2e-6 for t, y in zip(times, routed, strict=True))
    detach(pipeline)
    for t, y in zip(times, routed, strict=True):  # and each interval's experts are one ordinary LoRA, to be fused
        fused = tiny_unet()
        layers = dict(fused.named_modules())
        for path, update in lora_at(found.bundle, t).items():
            weight = layers[path].weight
            weight.data += update.view(weight.shape)
        assert max_error(predict(fused, t), y) <= 1e-5  # the sum stands in the weight, which rounds otherwise


def lora_at(bundle, t):
    """``sum_j (alpha_j / r_j) B_j A_j`` of every layer, of the experts that own a timestep."""
    found = {}
    for path in bundle.target_modules:
        found[path] = 0.0
        for scale in bundle.spec.scales:
            place = scale.partition.index_of(t)
            down, up = (bundle.tensors[f"{path}.experts.{scale.name}.{part}"][place] for part in "AB")
            found[path] = found[path] + scale.alpha / scale.rank * up @ down
    return found


def test_smooth_gates_are_rounded_to_intervals_and_say_by_how_much():
    made = bundle_of(tiny_unet(), MixtureSpec(rank_scales(1), RouterForm("rank", "t", knots=9)))
    coarse, fine = (to_switchable(made, Partition.uniform(n)).error for n in (4, 64))
    assert 0.01 < coarse < 1
    assert fine < coarse / 8  # the error of rounding to the middle falls with the width of the intervals
    with pytest.raises(UserError, match="name the intervals"):
        to_switchable(made)
    heard = bundle_of(tiny_unet(), MixtureSpec(rank_scales(1), RouterForm("rank", "z_and_t", "latent_rms")))
    with pytest.raises(UserError, match="hear the input too"):
        to_switchable(heard, Partition.uniform(4))
    with pytest.raises(UserError, match="has no gates"):
        to_switchable(bundle_of(tiny_unet(), MixtureSpec(scales(4))), Partition.uniform(4))


def test_what_rounding_costs_is_of_gates_alone():
    form = RouterForm("rank", "t", knots=2)
    alone = bundle_of(tiny_unet(), MixtureSpec(rank_scales(1), form))
    names = [name for name in alone.tensors if name.endswith("router.E")]
    ramp = torch.tensor([[0.0], [1.0]]).expand(2, 4)  # gates from 1 to 2
    lines = replace(alone, tensors={**alone.tensors, **dict.fromkeys(names, ramp)})
    t = np.arange(1000) + 0.5
    expected = np.sqrt(((t / 1000 - np.where(t < 500, 0.25, 0.75)) ** 2).mean() / ((1 + t / 1000) ** 2).mean())
    assert to_switchable(lines, Partition.uniform(2)).error == pytest.approx(expected, rel=1e-4)
    beside = bundle_of(tiny_unet(), MixtureSpec((*scales(1), *rank_scales(2)), form))
    lines = replace(beside, tensors={**beside.tensors, **dict.fromkeys(names, ramp)})
    assert to_switchable(lines, Partition.uniform(2)).error == pytest.approx(expected, rel=1e-4)  # cores have none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knots": 1}, "at least 2 knots"),
        ({"knots": ()}, "at least 2 knots"),
        ({"knots": (0,)}, "at least 2 knots"),
        ({"knots": (0, 500, 500, 1000)}, "ascending"),
        ({"knots": (1, 1000)}, "ascending from 0"),
        ({"knots": (0, 900)}, "end at T"),
        ({"knots": 1002}, r"T \+ 1"),
        ({"knots": 5, "intervals": Partition.uniform(4)}, "not both"),
        ({"intervals": Partition.uniform(4, 500)}, "end at 500"),
        ({"inputs": "z", "unit_rms": True}, "has none"),
        ({"inputs": "z", "knots": 9}, "has none"),
        ({"inputs": "z", "intervals": Partition.uniform(4)}, "has none"),
        ({"inputs": "t", "features": "latent_rms"}, "does not hear"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MixtureSpec(rank_scales(1), RouterForm(**options))


def test_gates_from_0_have_no_size_to_divide_by():
    with pytest.raises(UserError, match="base gate of 0"):
        MixtureSpec(rank_scales(1, base_gate=0.0), RouterForm("rank", "t", unit_rms=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_counts_are_those_of_the_tensors(form):
    unet = tiny_unet()
    spec = MixtureSpec((*scales(8), *rank_scales(4, 1)), form)
    mixture = Mixture.attach(unet, spec, TARGETS)
    shapes = Router.shapes(spec.gated_scales, 1000, form)
    for layer in mixture.layers.values():
        held = {name: tuple(tensor.shape) for name, tensor in layer.router.state_dict().items()}
        wanted = {
            n: tuple(layer.geometry.in_features if s is None else s for s in shape) for n, shape in shapes.items()
        }
        assert held == wanted
    assert mixture.count_parameters().stored == sum(tensor.numel() for tensor in mixture.state_dict().values())
