"""Mistakes are named, and leave everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import TARGETS, OneLayer, attach_to_layer, normal, randomise, scales, unet_inputs
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale, match_targets

SPEC = MixtureSpec(scales(8, 1))


def snapshot(model):
    return list(model.named_modules()), list(model._forward_pre_hooks), torch.get_rng_state().tolist()


def refuse_attaching(model, targets, match, spec=SPEC):
    """Attaching raises, and leaves modules, hooks and the random state as they were."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        Mixture.attach(model, spec, targets)
    assert snapshot(model) == before


# Attaching


def test_attaching_twice_is_refused(unet):
    mixture = Mixture.attach(unet, SPEC, ["to_q"])
    refuse_attaching(unet, ["to_k"], "already carries a mixture")
    mixture.detach()
    Mixture.attach(unet, SPEC, ["to_k"])


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        ("to_queries", "to_q"),
        ("time_embed_proj", "time_emb_proj"),
        ("attn1.to_values", "attn1.to_v"),
        ("ff.net.0.project", "ff.net.0.proj"),
        ("downsampler.0.conv", "downsamplers.0.conv"),
    ],
)
def test_pattern_that_matches_nothing_is_named_with_the_closest(unet, pattern, closest):
    with pytest.raises(ValueError, match=rf"\['{pattern}'\] match no layer of this UNet2DConditionModel") as refusal:
        Mixture.attach(unet, SPEC, ["to_k", pattern])
    listed = str(refusal.value).split("the closest are: ")[1].split(", ")
    assert 1 <= len(listed) <= 5
    assert listed[0] == closest
    for name in listed:
        assert match_targets(unet, [name])


def test_only_layers_that_are_like_the_pattern_are_proposed(unet):
    with pytest.raises(ValueError, match="match no layer") as refusal:
        Mixture.attach(unet, SPEC, ["to_k", "time_embed_proj"])
    assert "to_q" not in str(refusal.value)
    with pytest.raises(ValueError, match="match no layer") as refusal:
        Mixture.attach(unet, SPEC, ["to_k", "xyzzy"])  # like none: then any are better than none
    assert len(str(refusal.value).split("the closest are: ")[1].split(", ")) == 5


def test_pattern_that_matches_no_layer_that_can_carry_experts_is_told_apart(unet):
    refuse_attaching(unet, ["to_q", "to_out"], r"attn1\.to_out: a ModuleList cannot carry experts; allowed are linear")


def test_every_pattern_that_matches_nothing_has_a_line(unet):
    refuse_attaching(unet, ["to_q", "to_nowhere", "o_k"], r"\['to_nowhere', 'o_k'\] match(.*\n)+  'o_k'; .* to_k, ")


def test_regular_expression_that_matches_nothing_is_named_with_a_whole_name(unet):
    whole = r"must match a whole name, such as \S+\.\S+\.to_q"
    refuse_attaching(unet, r"to_q", rf"\['to_q'\] match no layer of this UNet2DConditionModel\n.*{whole}")


def test_no_pattern_is_refused(unet):
    refuse_attaching(unet, [], "match no layer")


class Nested(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(layer)

    def forward(self, sample, timestep):
        return self.inner(self.first(sample))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(4, 4),
        nn.ConvTranspose1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.ConvTranspose3d(4, 4, 3),
        nn.LayerNorm(4),
        nn.Sequential(nn.Linear(4, 4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_that_cannot_carry_experts_is_named(layer):
    refuse_attaching(Nested(layer), ["first", "inner.0"], rf"inner\.0: a {type(layer).__name__} cannot carry experts")


@pytest.mark.parametrize(("rank", "groups"), [(3, 2), (1, 4), (6, 4)])
def test_rank_must_be_a_multiple_of_the_groups(rank, groups):
    net = OneLayer(nn.Conv2d(8, 8, 3, groups=groups))
    refuse_attaching(net, ["layer"], rf"layer: rank.*{groups} group.*got {rank}", MixtureSpec(scales(8, rank=rank)))


def test_finding_a_mixture_where_there_is_none(unet):
    with pytest.raises(ValueError, match="UNet2DConditionModel carries no mixture"):
        Mixture.of(unet)


# The spec


@pytest.mark.parametrize("name", ["", "a.b", "a b", "core/1"])
def test_scale_name_must_fit_into_a_tensor_name(name):
    with pytest.raises(ValueError, match="scale's name"):
        Scale(name, Partition.uniform(8), 4, 4)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank):
    with pytest.raises(ValueError, match=rf"'core'.*from 1 to 65,536; got {rank}"):
        Scale("core", Partition.uniform(8), rank, 4)


@pytest.mark.parametrize("chosen", [(), (*scales(8, 1), *scales(1))], ids=["none", "repeated"])
def test_scales_must_be_there_and_have_unique_names(chosen):
    with pytest.raises(ValueError, match="unique scale names"):
        MixtureSpec(chosen)


def test_scales_must_share_the_number_of_timesteps():
    with pytest.raises(ValueError, match="T = 1000 and T = 500"):
        MixtureSpec((*scales(8), Scale("short", Partition.uniform(1, 500), 4, 4)))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_must_leave_something(dropout):
    with pytest.raises(ValueError, match=f"dropout.*got {dropout}"):
        MixtureSpec(scales(8), dropout=dropout)


def test_smooth_table_needs_two_knots():
    with pytest.raises(ValueError, match="at least 2 knots, ascending from 0 to T; got 1"):
        RouterForm(knots=1)


# Use


def test_unknown_mode_is_refused_and_changes_nothing(unet):
    mixture = Mixture.attach(unet, SPEC, ["to_q"])
    mixture.mode = "switch"
    with pytest.raises(ValueError, match="unknown mode 'merge': allowed are off, foster, switch, route"):
        mixture.mode = "merge"
    assert mixture.mode == "switch"


def test_unknown_scale_is_refused_and_changes_nothing(unet):
    mixture = Mixture.attach(unet, SPEC, ["to_q"])
    for use in (mixture.foster, mixture.stacks, mixture.spec.scale):
        with pytest.raises(ValueError, match="no scale 'n2' in this mixture: it has n8, n1"):
            use("n2")
    assert mixture.mode == "off"


@pytest.mark.parametrize("mode", ["foster", "switch", "route"])
def test_layer_without_a_bound_timestep_says_what_to_do(unet, mode):
    mixture = Mixture.attach(unet, SPEC, ["to_q"])
    if mode == "foster":
        mixture.foster("n8")
    else:
        mixture.mode = mode
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with pytest.raises(RuntimeError, match=r"mid_block.*attn1\.to_q.*Mixture\.at\(t\)"):
        layer(normal(2, 3, 16))
    mixture.mode = "off"
    assert torch.equal(layer(normal(2, 3, 16)), layer.forward(normal(2, 3, 16)))


@pytest.mark.parametrize("num_samples", [1, 2, 5])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(6, 4), (7, 6)), (nn.Conv2d(6, 4, 3), (6, 5, 5))], ids=["linear", "conv"]
)
def test_batch_that_is_no_multiple_of_the_timesteps_is_an_error(layer, shape, num_samples):
    net, _ = attach_to_layer(copy.deepcopy(layer), MixtureSpec(scales(8, 1, rank=5)), "route")
    with pytest.raises((ValueError, RuntimeError)):
        net(normal(num_samples, *shape), torch.tensor([10.0, 500.0, 900.0]))


# Loading


def test_wrong_state_lists_every_difference_and_loads_nothing(unet):
    mixture = randomise(Mixture.attach(unet, SPEC, TARGETS))
    before = {key: value.clone() for key, value in mixture.state_dict().items()}
    missing, reshaped, *_ = sorted(before)
    wrong = {key: value + 1 for key, value in before.items() if key != missing}
    wrong[reshaped] = wrong[reshaped][:, :1]
    wrong["nowhere.experts.n8.A"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as raised:
        mixture.load_state_dict(wrong)
    lines = {line.strip() for line in str(raised.value).splitlines()[1:]}
    assert lines == {
        f"missing: {missing}",
        "unexpected: nowhere.experts.n8.A",
        f"{reshaped}: the model has {tuple(before[reshaped].shape)}, the file {tuple(wrong[reshaped].shape)}",
    }
    after = mixture.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_state_of_another_mixture_is_refused(unet):
    mixture = Mixture.attach(unet, SPEC, ["to_q"])
    state = mixture.state_dict()
    mixture.detach()
    other = Mixture.attach(unet, MixtureSpec(scales(4, 1)), ["to_q"])
    with pytest.raises(ValueError, match=r"missing: .*n4"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="missing: "):
        other.load_state_dict({})


def test_failed_forward_pass_leaves_the_mixture_usable(unet):
    mixture = randomise(Mixture.attach(unet, SPEC, TARGETS))
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    expected = unet(latents, 300, text).sample
    with pytest.raises(RuntimeError):
        unet(latents, 900, text[..., :3])
    assert torch.equal(unet(latents, 300, text).sample, expected)
