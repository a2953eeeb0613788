"""LoRAs made of experts: what diffusers loads is what was meant, and what cannot be is said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import max_error, normal, randomise, scales, tiny_pipeline
from test_cli import call, refused
from timestep_experts.config import load_recipe
from timestep_experts.formats import Bundle, load_bundle, save_bundle
from timestep_experts.formats.lora import LORA_FILE
from timestep_experts.inference import attach
from timestep_experts.jobs.measuring import measured_base
from timestep_experts.merging import QuadraticSettings, weighted_sum
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.mixture.carriers import named_layers
from timestep_experts.weights.extract import extract_lora
from timestep_experts.weights.inputs import BASE_KEY
from timestep_experts.weights.lora import LoraSettings, expert_shares, label_experts, merge_lora, read_parts
from timestep_experts.weights.search_methods import SearchSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No LoRA keys associated"),
]

UNET = ["to_q", "to_out.0", "conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj"]
TEXT = ["q_proj", "fc1"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Case:
    """A tiny base and a bundle of 2 + 1 experts on its UNet and text encoder."""

    folder: Path
    settings: LoraSettings

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def run(self, **options: Any) -> Any:
        return merge_lora(self.bundle, self.output, self.settings, **options)

    def spoil(self, change: Callable[[Bundle], Bundle]) -> None:
        save_bundle(change(load_bundle(self.bundle)), self.bundle)


def make_bundle(base: Path, folder: Path) -> Bundle:
    pipeline = tiny_pipeline()
    spec = MixtureSpec(scales(2, 1))
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    mixture = randomise(Mixture.attach(networks, spec, {"unet": UNET, "text_encoder": TEXT}))
    tensors = {name: value.clone() for name, value in mixture.state_dict().items()}
    bundle = Bundle(spec, tuple(mixture.layers), tensors, "switch", str(base), "UNet2DConditionModel", {})
    save_bundle(bundle, folder)
    return bundle


@pytest.fixture
def case(tmp_path: Path) -> Case:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    make_bundle(tmp_path / "base", tmp_path / "bundle")
    recipe = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "run"),
        "resolution": 16,
        "data": {"path": "world/neon", "max_train_samples": 2, "max_validation_samples": 6},
        "method": {"kind": "foster", "experts": {"scales": [{"intervals": 2}]}},
        "evaluation": {"num_pictures": 2, "bins_per_interval": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Case(tmp_path, LoraSettings(12))


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents = normal(1, 4, 8, 8, seed=5)
    drawn = pipeline("red star", num_inference_steps=3, guidance_scale=2.0, latents=latents, output_type="latent")
    return torch.as_tensor(drawn.images)


def fold(pipeline: StableDiffusionPipeline, bundle: Bundle, weights: tuple[float, ...]) -> None:
    """Add the exact weighted sum to the weights, by the formula."""
    for path in bundle.target_modules:
        part, _, inner = path.partition(".")
        weight = named_layers(getattr(pipeline, part))[inner].weight
        index = 0
        for scale in bundle.spec.scales:
            down, up = (bundle.tensors[f"{path}.experts.{scale.name}.{name}"] for name in "AB")
            for a, b in zip(down, up, strict=True):
                weight.data += (weights[index] * scale.alpha / scale.rank * b @ a).reshape(weight.shape)
                index += 1


# Merging


@pytest.mark.parametrize("weights", [None, (0.7, -0.2, 0.4)])
def test_diffusers_draws_with_it_what_folded_weights_draw(case: Case, weights: tuple[float, ...] | None) -> None:
    case.settings = replace(case.settings, weights=weights)
    merged = case.run()
    folded = tiny_pipeline()
    fold(folded, load_bundle(case.bundle), weights or (0.5, 0.5, 1.0))
    loaded = StableDiffusionPipeline.from_pretrained(case.folder / "base", safety_checker=None)
    before = draw(loaded)
    loaded.load_lora_weights(case.output)
    assert loaded.get_list_adapters().keys() == {"unet", "text_encoder"}
    expected = draw(folded)
    assert max_error(draw(loaded), expected) < 1e-4
    assert max_error(before, expected) > 1e-2
    assert merged.total_kept == pytest.approx(1)
    assert set(merged.kept) == set(load_bundle(case.bundle).target_modules)


def test_experts_are_named_and_have_their_shares(case: Case) -> None:
    bundle = load_bundle(case.bundle)
    assert label_experts(bundle) == ("n2 [0, 500)", "n2 [500, 1000)", "n1 [0, 1000)")
    assert expert_shares(bundle) == (0.5, 0.5, 1.0)


def test_a_lower_rank_is_the_nearest(case: Case) -> None:
    case.settings = replace(case.settings, rank=3)
    merged = case.run()
    written = load_file(case.output / LORA_FILE)
    parts, layers = read_parts(load_bundle(case.bundle), str(case.folder / "base"))
    energy = kept = 0.0
    for path, updates in parts.items():
        left, values, right = torch.linalg.svd(
            weighted_sum(updates, merged.weights).product().double(), full_matrices=False
        )
        down, up = written[f"{path}.lora_A.weight"], written[f"{path}.lora_B.weight"]
        assert down.shape == (3, layers[path].in_features, *layers[path].kernel_size)
        assert max_error(up.flatten(1) @ down.flatten(1), left[:, :3] * values[:3] @ right[:3]) < 1e-5
        energy += float(values.square().sum())
        kept += float(values[:3].square().sum())
    assert merged.total_kept == pytest.approx(kept / energy, abs=1e-6)
    record = json.loads((case.output / "merge.json").read_text())
    assert record["energy_kept_by_layer"] == dict(merged.kept)


def test_the_bundle_beside_it_is_the_same(case: Case) -> None:
    case.settings = replace(case.settings, with_bundle=True)
    case.run()
    one, two = tiny_pipeline(), tiny_pipeline()
    attach(one, case.output / "bundle")
    two.load_lora_weights(case.output)
    assert max_error(draw(one), draw(two)) < 1e-4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_other_dtypes(case: Case, dtype: str) -> None:
    case.settings = replace(case.settings, dtype=dtype)
    case.run()
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {value.dtype for value in load_file(case.output / LORA_FILE).values()} == {kind}


def test_losses_are_measured_with_a_recipe(case: Case) -> None:
    case.settings = replace(case.settings, rank=2)
    merged = case.run(measured=measured_base(load_recipe(case.folder / "recipe.yaml")))
    assert [row.name for row in merged.rows] == ["base", "experts, switching", "their sum, r12", "LoRA r2"]
    means = [row.confirmation_mean for row in merged.rows]
    assert len(set(means)) == 4
    full = replace(case, folder=case.folder, settings=LoraSettings(12))
    (case.output).rename(case.folder / "low")
    rows = full.run(measured=measured_base(load_recipe(case.folder / "recipe.yaml"))).rows
    assert rows[2].confirmation_mean == pytest.approx(rows[3].confirmation_mean, abs=1e-5)
    assert rows[2].confirmation_mean == means[2]


def test_weights_are_searched_on_the_exact_sum(case: Case) -> None:
    few = SearchSettings(quadratic=QuadraticSettings(refinements=1))
    merged = case.run(measured=measured_base(load_recipe(case.folder / "recipe.yaml")), search=few)
    search = merged.search
    assert [row.name for row in search.rows] == ["base", *merged.labels, "shares", "found"]
    assert search.found.selection_mean == min(point.loss for point in search.evaluated)
    assert search.rows[0].selection_mean == pytest.approx(merged.rows[0].selection_mean, abs=1e-6)
    assert merged.weights == search.found.weights
    assert search.found.confirmation_mean == pytest.approx(merged.rows[2].confirmation_mean, abs=1e-6)
    assert json.loads((case.output / "search.json").read_text())["weights"] == list(merged.weights)


def fewer_weights(case: Case) -> None:
    case.settings = replace(case.settings, weights=(1.0, 2.0))


def large_rank(case: Case) -> None:
    case.settings = replace(case.settings, rank=13)


def no_rank(case: Case) -> None:
    case.settings = replace(case.settings, rank=0)


def other_base(case: Case) -> None:
    case.spoil(lambda b: replace(b, tensors={n: v[..., :-1] if n.endswith(".A") else v for n, v in b.tensors.items()}))


def other_layers(case: Case) -> None:
    case.spoil(lambda b: replace(b, target_modules=(*b.target_modules, "unet.nothing")))


def strange_layers(case: Case) -> None:
    def renamed(b: Bundle) -> Bundle:
        tensors = {name.replace("conv1", "conv9"): value for name, value in b.tensors.items()}
        return replace(b, target_modules=tuple(m.replace("conv1", "conv9") for m in b.target_modules), tensors=tensors)

    case.spoil(renamed)


def parted_experts(case: Case) -> None:
    case.spoil(lambda b: replace(b, tensors={n: v[:1] if ".experts." in n else v for n, v in b.tensors.items()}))


def nan_tensor(case: Case) -> None:
    case.spoil(lambda b: replace(b, tensors={n: v * math.nan for n, v in b.tensors.items()}))


def huge_weights(case: Case) -> None:
    case.settings = replace(case.settings, weights=(1e12, 0.0, 0.0), dtype="fp16")


def exists(case: Case) -> None:
    case.output.mkdir()


FAULTS = [
    (fewer_weights, r"there are 2 weights for 3 experts: n2 \[0, 500\), n2 \[500, 1000\), n1"),
    (large_rank, "rank 13 is not allowed: the experts have 12 together, so 1 to 12 are"),
    (no_rank, "rank 0 is not allowed"),
    (other_base, "the bundle's experts are for a layer of"),
    (other_layers, r"is damaged: (.*\n)+  missing: unet.nothing.experts.n2.A"),
    (strange_layers, r"the bundle has experts for unet\..*conv9, which .*base lacks"),
    (parted_experts, "has 1 of the 2 experts of scale n2: denoisers share out the timesteps"),
    (nan_tensor, "has numbers that are not finite"),
    (huge_weights, "is not finite in torch.float16; take smaller weights or another dtype"),
    (exists, "out exists already"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_a_fault_is_named_and_leaves_nothing(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    before = sorted(case.folder.glob("**/*"))
    with pytest.raises(ValueError, match=message) as caught:
        case.run()
    assert "Error" not in str(caught.value)
    assert sorted(case.folder.glob("**/*")) == before


def test_a_search_needs_a_recipe(case: Case) -> None:
    with pytest.raises(ValueError, match="a search for weights needs a base and pictures"):
        case.run(search=SearchSettings())
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        LoraSettings(4, dtype="int8")


# Extracting


def tuned(folder: Path, seed: int, strength: float = 0.05) -> Path:
    """The base's UNet with every tensor moved; of low rank where it is a layer's."""
    unet = tiny_pipeline().unet
    for index, parameter in enumerate(unet.parameters()):
        parameter.data += strength * normal(*parameter.shape, seed=100 * seed + index)
    unet.save_pretrained(folder)
    return folder


def test_full_rank_is_the_expert_but_for_what_is_left_out(case: Case) -> None:
    expert = tuned(case.folder / "expert", 1)
    extracted = extract_lora(case.folder / "base", expert, case.output, LoraSettings(32))
    goal = UNet2DConditionModel.from_pretrained(expert).state_dict()
    base = tiny_pipeline().unet.state_dict()
    written = load_file(case.output / LORA_FILE)
    layers = {key.split(".lora_")[0] for key in written}
    for layer in layers:
        name = f"{layer.removeprefix('unet.')}.weight"
        down, up = written[f"{layer}.lora_A.weight"], written[f"{layer}.lora_B.weight"]
        rebuilt = base.pop(name) + (up.flatten(1) @ down.flatten(1)).reshape(goal[name].shape)
        assert max_error(rebuilt, goal[name]) < 1e-5
    assert set(extracted.left_out) == set(base)  # norms and biases
    assert all(name.endswith(".bias") or "norm" in name for name in base)
    assert sum(extracted.left_out.values()) + extracted.total_kept == pytest.approx(1)
    assert all(kept == pytest.approx(1) for kept in extracted.kept.values())


def test_diffusers_draws_with_what_was_extracted(case: Case) -> None:
    expert = tuned(case.folder / "expert", 1)
    settings = LoraSettings(32, with_bundle=True)
    extracted = extract_lora(case.folder / "base", expert, case.output, settings)
    wanted, loaded, bundled = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    goal = UNet2DConditionModel.from_pretrained(expert).state_dict()
    base = wanted.unet.state_dict()
    wanted.unet.load_state_dict({**goal, **{name: base[name] for name in extracted.left_out}})
    loaded.load_lora_weights(case.output)
    attach(bundled, case.output / "bundle")
    assert max_error(draw(loaded), draw(wanted)) < 1e-4
    assert max_error(draw(bundled), draw(wanted)) < 1e-4


def test_a_denoisers_folder_will_do(case: Case) -> None:
    expert = tuned(case.folder / "expert", 1)
    extract_lora(case.folder / "base" / "unet", expert, case.output, LoraSettings(2))
    extract_lora(case.folder / "base", expert, case.folder / "other", LoraSettings(2))
    one, two = load_file(case.output / LORA_FILE), load_file(case.folder / "other" / LORA_FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def change(expert: Path, name: str, value: Tensor | None, **metadata: str) -> None:
    tensors = load_file(expert / WEIGHTS)
    changed = {**tensors, name: value}
    save_file({n: v for n, v in changed.items() if v is not None}, expert / WEIGHTS, metadata or None)


@pytest.mark.parametrize(
    ("spoil", "rank", "message"),
    [
        (lambda e: change(e, "conv_in.bias", None), 2, "other tensors than the base .* lacks conv_in.bias"),
        (lambda e: change(e, "conv_in.bias", torch.ones(3)), 2, r"conv_in.bias has shape \(3,\); the base's is \(8,\)"),
        (lambda e: change(e, "conv_in.bias", torch.full((8,), math.nan)), 2, "conv_in.bias is not finite: 8 of 8"),
        (lambda e: change(e, "conv_in.bias", torch.ones(8), **{BASE_KEY: "0" * 64}), 2, "trained from another base"),
        (lambda e: None, 999, "rank 999 is not allowed: no layer of .* can use more than"),
        (lambda e: tiny_pipeline().unet.save_pretrained(e), 2, "no linear or convolutional layer of .* differs"),
    ],
)
def test_extracting_refuses(case: Case, spoil: Callable[[Path], object], rank: int, message: str) -> None:
    expert = tuned(case.folder / "expert", 1)
    spoil(expert)
    before = sorted(case.folder.glob("**/*"))
    with pytest.raises(ValueError, match=message) as caught:
        extract_lora(case.folder / "base", expert, case.output, LoraSettings(rank))
    assert "Error" not in str(caught.value)
    assert sorted(case.folder.glob("**/*")) == before


def test_weights_alone_name_no_layers(case: Case) -> None:
    expert = tuned(case.folder / "expert", 1)
    with pytest.raises(ValueError, match=r"must be a pipeline's folder, or a denoiser's with its config\.json"):
        extract_lora(expert / WEIGHTS, expert, case.output, LoraSettings(2))
    with pytest.raises(ValueError, match="has no denoiser or text encoder 'vae'; it has unet, text_encoder"):
        extract_lora(case.folder / "base", expert, case.output, LoraSettings(2), "vae")


# The commands


def test_the_commands_print_what_they_made(case: Case) -> None:
    outcome = call("merge-lora", case.bundle, case.output, "--rank", 4, "--recipe", case.folder / "recipe.yaml")
    assert outcome.code == 0, outcome.err
    assert "LoRA r4" in outcome.out
    assert "n1 [0, 1000): 1" in outcome.out
    expert = tuned(case.folder / "expert", 1)
    outcome = call("extract-lora", case.folder / "base", expert, case.folder / "x", "--rank", 2)
    assert outcome.code == 0, outcome.err
    assert "left out, for no LoRA can hold" in outcome.out
    text = refused("merge-lora", case.bundle, case.folder / "y", "--rank", 4, "--weights", "1,x")
    assert text == "--weights takes numbers separated by commas; got '1,x'"
    text = refused("merge-lora", case.bundle, case.folder / "y", "--rank", 4, "--budget", 3)
    assert text == "--budget has no meaning without --search"
    text = refused("merge-lora", case.bundle, case.folder / "y", "--rank", 4, "--model", "a", "--recipe", "b")
    assert "give either --model or --recipe" in text
