"""The bundle: what is saved is what is loaded, and what does not fit is refused without a trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import max_error, normal, randomise, scales, tiny_pipeline, tiny_unet, unet_inputs
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle, SamplingDefaults, bundle, load_bundle, save_bundle
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.formats.bundle import BundleDocument
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale

TARGETS = ("to_q", "conv1")
SPEC = MixtureSpec(
    (
        Scale("fine", Partition((0, 125.5, 400, 1000)), rank=2, alpha=3),
        Scale("coarse", Partition.uniform(1), rank=4, alpha=0.5, gated=True, base_gate=1.0),
    ),
    RouterForm(inputs="t", knots=5),
    dropout=0.25,
)


def bundle_of(model: nn.Module, spec: MixtureSpec = SPEC, targets: tuple[str, ...] = TARGETS, **changes: Any) -> Bundle:
    """The bundle of random experts made on a model, which is left without them."""
    mixture = randomise(Mixture.attach(model, spec, targets))
    made = Bundle(
        spec=mixture.spec,
        target_modules=tuple(mixture.layers),
        tensors={key: value.clone() for key, value in mixture.state_dict().items()},
        mode="route",
        base_model="a tiny base",
        denoiser_class=type(model).__name__,
        provenance={"seed": 3, "losses": {"stage": [0.5, None]}, "Größe": "ä"},
    )
    mixture.detach()
    return replace(made, **changes)


@pytest.fixture
def made() -> Bundle:
    return bundle_of(tiny_unet())


def assert_equal(one: Bundle, other: Bundle) -> None:
    for field in fields(Bundle):
        if field.name != "tensors":
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    assert all(one.tensors[key].dtype == other.tensors[key].dtype for key in one.tensors)


# Round trip


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        MixtureSpec(scales(8)),
        MixtureSpec(scales(4, 2, 1, base_gate=0.5), RouterForm(inputs="z")),
        MixtureSpec((Scale("a-b_1", Partition((0, 1 / 3, 1000)), 1, 1e-3),)),
    ],
    ids=["smooth", "core only", "two contexts", "odd numbers"],
)
def test_a_bundle_comes_back_as_it_was(spec: MixtureSpec, tmp_path: Path) -> None:
    made = bundle_of(tiny_unet(), spec)
    save_bundle(made, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle")
    assert_equal(loaded, made)
    assert loaded.spec.scales[0].partition.boundaries == spec.scales[0].partition.boundaries
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["mixture.json", "mixture.safetensors"]
    assert_equal(load_bundle(str(tmp_path / "bundle")), made)


def test_a_gate_per_token_comes_back(tmp_path: Path) -> None:
    made = bundle_of(tiny_unet(), replace(SPEC, router=RouterForm(positions="token")), ("to_q",))
    save_bundle(made, tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").spec == made.spec


def test_equal_bundles_have_equal_bytes(made: Bundle, tmp_path: Path) -> None:
    shuffled = replace(made, tensors=dict(reversed(made.tensors.items())))
    save_bundle(made, tmp_path / "one")
    save_bundle(shuffled, tmp_path / "other")
    for name in ("mixture.json", "mixture.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_half_precision_tensors_keep_their_dtype(made: Bundle, tmp_path: Path) -> None:
    half = replace(made, tensors={key: value.bfloat16() for key, value in made.tensors.items()})
    save_bundle(half, tmp_path / "bundle")
    assert_equal(load_bundle(tmp_path / "bundle"), half)


# Writing


def test_a_new_bundle_takes_the_place_of_the_old(made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    (tmp_path / "bundle" / "of-the-old-one").touch()
    newer = replace(made, mode="switch")
    save_bundle(newer, tmp_path / "bundle")
    assert_equal(load_bundle(tmp_path / "bundle"), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert len(list((tmp_path / "bundle").iterdir())) == 2


@pytest.mark.parametrize("writer", ["write_tensors", "write_json"])
def test_a_failure_while_writing_leaves_the_old_bundle(
    writer: str, made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    save_bundle(made, tmp_path / "bundle")
    monkeypatch.setattr(bundle, writer, full)
    with pytest.raises(UserError, match=r"cannot write .*: no space left"):
        save_bundle(replace(made, mode="switch"), tmp_path / "bundle")
    with pytest.raises(UserError, match=r"cannot write .*: no space left"):
        save_bundle(made, tmp_path / "first")
    assert_equal(load_bundle(tmp_path / "bundle"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_exchange_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    move = Path.replace

    def refuse_draft(self: Path, target: Path) -> Path:
        if ".draft-" in self.name:
            raise PermissionError("the draft cannot be moved")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", refuse_draft)
    with pytest.raises(UserError, match="the draft cannot be moved"), atomic_path(tmp_path / "kept") as draft:
        draft.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "old").exists()


def test_what_cannot_be_written_as_json_leaves_nothing(made: Bundle, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_bundle(replace(made, provenance={"path": tmp_path}), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


# Reading what is damaged


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "mixture.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        *(
            pytest.param(lambda d, key=key: d.pop(key), id=f"no {key}")
            for key in ("format_version", "mode", "base_model", "denoiser_class", "mixture", "target_modules")
        ),
        pytest.param(lambda d: d.update(format_version="one"), id="version is text"),
        pytest.param(lambda d: d.update(mode="banana"), id="unknown mode"),
        pytest.param(lambda d: d.update(target_modules=None), id="no modules"),
        pytest.param(lambda d: d.update(mixture=[]), id="no mixture"),
        pytest.param(lambda d: d["mixture"]["router"].update(gates="both"), id="unknown gate"),
        pytest.param(lambda d: d["mixture"].update(scales=[]), id="no scale"),
        pytest.param(lambda d: d["mixture"]["scales"][0].update(rank=0), id="rank 0"),
        pytest.param(lambda d: d["mixture"]["scales"][0]["partition"].update(boundaries=[0, 5, 2]), id="boundaries"),
    ],
)
def test_a_damaged_description_is_refused(
    change: Callable[[dict[str, Any]], None], made: Bundle, tmp_path: Path
) -> None:
    save_bundle(made, tmp_path / "bundle")
    edit(tmp_path / "bundle", change)
    with pytest.raises(ValueError, match=rf"the bundle {tmp_path / 'bundle'} is damaged: "):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format": "\xff"}', b"[1, 2"], ids=["empty", "half", "latin-1", "list"]
)
def test_a_description_that_is_not_json_is_refused(content: bytes, made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    (tmp_path / "bundle" / "mixture.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"the bundle {tmp_path / 'bundle'} is damaged: mixture\.json is not JSON"):
        load_bundle(tmp_path / "bundle")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b""), cut], ids=["missing", "empty", "cut"]
)
def test_damaged_tensors_are_refused(damage: Callable[[Path], None], made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    damage(tmp_path / "bundle" / "mixture.safetensors")
    with pytest.raises(ValueError, match=rf"the bundle {tmp_path / 'bundle'} is damaged: "):
        load_bundle(tmp_path / "bundle")


def test_a_newer_format_is_refused_with_both_versions(made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    edit(tmp_path / "bundle", lambda document: document.update(format_version=4))
    with pytest.raises(ValueError, match="has format version 4; this release reads up to 3"):
        load_bundle(tmp_path / "bundle")


def routers_as_before(document: dict[str, Any]) -> dict[str, Any]:
    """The keys that said what routers are up to version 2."""
    router = document["mixture"].pop("router")
    return {"router_input": router["inputs"], "gate": router["positions"], "router_knots": router["knots"]}


def test_the_second_format_is_lifted(made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")

    def write_as_before(document: dict[str, Any]) -> None:
        document.update(format_version=2)
        document["mixture"].update(routers_as_before(document))

    edit(tmp_path / "bundle", write_as_before)
    assert_equal(load_bundle(tmp_path / "bundle"), made)


@pytest.mark.parametrize(
    "form",
    [
        RouterForm("rank", "z_and_t", "latent_rms", knots=(0.0, 10.5, 1000.0), unit_rms=True),
        RouterForm("rank", "t", intervals=Partition((0, 125.5, 1000))),
    ],
    ids=["knots", "intervals"],
)
def test_every_form_of_router_comes_back(form: RouterForm, tmp_path: Path) -> None:
    made = bundle_of(tiny_unet(), replace(SPEC, router=form))
    save_bundle(made, tmp_path / "bundle")
    assert_equal(load_bundle(tmp_path / "bundle"), made)


def test_the_first_format_is_lifted(made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    training = {"base_dtype": "bf16", "base_quantization": None}
    recipe = {"resolution": [64, 32], "training": training, "data": {"clips": {"num_frames": 4, "fps": 8, "stride": 2}}}
    generator = {"scheduler": "LCMScheduler", "timesteps": [999, 499], "guidance_scale": 1.0}

    def write_as_before(document: dict[str, Any]) -> None:
        document.update(format_version=1, provenance={"recipe": recipe, "sampling": generator})
        del document["sampling"]
        document["mixture"].update(routers_as_before(document))
        for scale in document["mixture"]["scales"]:
            scale["resting_gate"] = scale.pop("base_gate")

    edit(tmp_path / "bundle", write_as_before)
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.spec == made.spec
    assert loaded.sampling == SamplingDefaults(
        base_dtype="bf16",
        resolution=(64, 32),
        num_frames=4,
        fps=4.0,
        scheduler="LCMScheduler",
        timesteps=(999, 499),
        guidance_scale=1.0,
    )


@pytest.mark.parametrize(
    "change", [{"base_dtyp": "fp32"}, {"base_dtype": "fp8"}, {"resolution": [64]}, {"fps": 0}], ids=str
)
def test_sampling_settings_have_a_schema(change: dict[str, object], made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path / "bundle")
    edit(tmp_path / "bundle", lambda document: document.update(sampling=change))
    with pytest.raises(ValueError, match=rf"the bundle {tmp_path / 'bundle'} is damaged: (.|\n)*{next(iter(change))}"):
        load_bundle(tmp_path / "bundle")


def test_the_documented_keys_are_those_of_the_schema() -> None:
    text = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    tables = {block.split("\n")[0]: block for block in text.split("\n\n") if block.startswith("| key")}
    named = {head: "".join(re.findall(r"^\| (`.*?) \|", block, re.M)) for head, block in tables.items()}
    keys = {head: set(re.findall(r"`([a-z_0-9]+)(?:\.[a-z_\[\]]+)?`", names)) for head, names in named.items()}
    assert keys["| key of `sampling` | meaning |"] == set(SamplingDefaults.model_fields)
    assert keys["| key | meaning |"] == set(BundleDocument.model_fields)


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": "pytorch"}', "null"])
def test_something_else_is_not_a_bundle(content: str, tmp_path: Path) -> None:
    (tmp_path / "mixture.json").write_text(content)
    with pytest.raises(ValueError, match="does not describe a bundle: its 'format' should be 'timestep-experts/bund"):
        load_bundle(tmp_path)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no bundle at {tmp_path}: it has no mixture\.json"):
        load_bundle(tmp_path)


# Attaching


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {key: value.reshape(-1).view(torch.uint8).numpy().tobytes() for key, value in model.state_dict().items()}


def refuse(pipeline: StableDiffusionPipeline, made: Bundle, *match: str) -> None:
    """Attaching raises, its message holds every text, and the model is as it was, to the byte."""
    before, modules = bytes_of(pipeline.unet), list(pipeline.unet.named_modules())
    with pytest.raises(ValueError, match=re.escape(match[0])) as caught:
        attach(pipeline, made)
    assert all(text in str(caught.value) for text in match)
    assert bytes_of(pipeline.unet) == before
    assert list(pipeline.unet.named_modules()) == modules
    assert not pipeline.unet._forward_pre_hooks
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


def test_attaching_from_a_folder_gives_the_experts_back(
    made: Bundle, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_bundle(made, tmp_path / "bundle")
    before = bytes_of(pipeline.unet)
    for source in (made, tmp_path / "bundle", str(tmp_path / "bundle")):
        mixture = attach(pipeline, source)
        assert mixture.mode == "route"
        assert mixture.spec == made.spec
        assert all(torch.equal(mixture.state_dict()[key], value) for key, value in made.tensors.items())
        assert not any(p.requires_grad for layer in mixture.layers.values() for p in layer.experts.parameters())
        assert not any(p.requires_grad for group in mixture.router_parameters() for p in group)
        detach(pipeline)
    assert bytes_of(pipeline.unet) == before


def test_the_mode_may_be_chosen(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    assert attach(pipeline, made, "switch").mode == "switch"


@pytest.mark.parametrize("kind", ["safetensors", "memory"])
def test_missing_and_foreign_tensors_are_listed(
    kind: str, made: Bundle, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    first, second, *_ = made.tensors
    wrong = dict(made.tensors) | {"stranger": normal(2), second: normal(3, 3)}
    del wrong[first]
    if kind == "safetensors":
        save_bundle(made, tmp_path)
        save_file(wrong, tmp_path / "mixture.safetensors")
        with pytest.raises(UserError) as refused:
            load_bundle(tmp_path)
        for line in (f"missing: {first}", "unexpected: stranger", f"{second}: mixture.json and the shape (3, 3)"):
            assert f"\n  {line}" in str(refused.value)
        return
    made = replace(made, tensors=wrong)
    shape = tuple(load_shape(pipeline, second))
    refuse(pipeline, made, f"missing: {first}", "unexpected: stranger", f"{second}: the model has {shape}, the file (3")


def load_shape(pipeline: StableDiffusionPipeline, key: str) -> torch.Size:
    mixture = Mixture.attach(pipeline.unet, SPEC, TARGETS)
    shape = mixture.state_dict()[key].shape
    mixture.detach()
    return shape


def test_a_model_without_the_modules_is_refused(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    modules = (*made.target_modules, "mid_block.attentions.7.to_q")
    refuse(
        pipeline,
        replace(made, target_modules=modules),
        "made for a UNet2DConditionModel (a tiny base)",
        f"lacks 1 of its {len(modules)} modules:\n  mid_block.attentions.7.to_q",
    )


def wider_unet() -> UNet2DConditionModel:
    config = dict(tiny_unet().config) | {"block_out_channels": (12, 24), "norm_num_groups": 4}
    return UNet2DConditionModel.from_config(config).eval()


def test_a_model_of_other_widths_is_refused(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet = wider_unet()
    key = next(key for key in made.tensors if key.endswith("experts.fine.A"))
    rows = made.tensors[key].shape
    refuse(pipeline, made, f"{key}: the model has ({rows[0]}, {rows[1]}, ", f"the file {tuple(rows)}")


def test_a_module_that_cannot_carry_experts_is_refused(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    refuse(pipeline, replace(made, target_modules=("conv_norm_out",)), "conv_norm_out: a GroupNorm cannot carry")


def test_an_unknown_mode_is_refused(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    refuse(pipeline, replace(made, mode="banana"), "unknown mode 'banana'")


def test_attaching_twice_is_refused(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    mixture = attach(pipeline, made)
    with pytest.raises(ValueError, match="already carries a mixture"):
        attach(pipeline, made)
    assert Mixture.of(pipeline.unet).layers == mixture.layers


def test_detaching_nothing_and_attaching_to_nothing(made: Bundle, pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="carries no mixture"):
        detach(pipeline)
    with pytest.raises(ValueError, match="a SimpleNamespace has neither a unet nor a transformer"):
        attach(SimpleNamespace(unet=None, components={}, config={}), made)


class Twins(nn.Module):
    """A denoiser whose last layer's name ends an inner layer's name, as in several transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("proj_out", nn.Linear(4, 4))
        self.proj_out = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.proj_out(self.block(hidden_states))


def test_exactly_the_named_modules_carry_experts() -> None:
    made = bundle_of(Twins(), targets="proj_out")
    assert made.target_modules == ("proj_out",)
    twins = Twins()
    mixture = attach(SimpleNamespace(transformer=twins, components={"transformer": twins}, config={}), made)
    assert tuple(mixture.layers) == ("proj_out",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_experts_take_the_pipelines_dtype_and_routers_stay_fp32(
    dtype: torch.dtype, made: Bundle, pipeline: StableDiffusionPipeline
) -> None:
    pipeline.unet.to(dtype)
    mixture = attach(pipeline, made)
    assert {value.dtype for key, value in mixture.state_dict().items() if ".experts." in key} == {dtype}
    assert {value.dtype for key, value in mixture.state_dict().items() if ".router." in key} == {torch.float32}
    if dtype == torch.float16:
        return  # slow on a CPU
    latents, text = (value.to(dtype) for value in unet_inputs(2))
    t = torch.tensor([10, 900])
    with torch.no_grad():
        low = pipeline.unet(latents, t, text).sample
    assert low.dtype == dtype
    exact = tiny_pipeline()
    attach(exact, made)
    with torch.no_grad():
        high = exact.unet(latents.float(), t, text.float()).sample
    # outputs near 1; bf16 keeps 8 bits and rounds in every layer, fp64 against fp32 leaves fp32's rounding
    assert max_error(low, high) <= {torch.bfloat16: 0.1, torch.float64: 1e-5}[dtype]


def test_the_file_holds_nothing_of_the_base(made: Bundle, tmp_path: Path) -> None:
    save_bundle(made, tmp_path)
    kinds = set()
    for key in load_file(tmp_path / "mixture.safetensors"):
        (module,) = (name for name in made.target_modules if key.startswith(f"{name}."))
        kinds.add(key.removeprefix(f"{module}."))
    assert kinds == {"experts.fine.A", "experts.fine.B", "experts.coarse.A", "experts.coarse.B", "router.E"}
