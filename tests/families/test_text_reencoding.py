"""Every family with experts on its text encoders: what its pipeline gives the denoiser at each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from tiny import flux, pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiny_video import tiny_video_crafter, tiny_wan
from torch import Tensor, nn

from conftest import max_error, randomise, scales
from timestep_experts.formats import Bundle
from timestep_experts.inference import Reencoder, attach, detach
from timestep_experts.mixture import Mixture, MixtureSpec, timestep_input_of
from timestep_experts.models import (
    Family,
    Flux,
    PixArt,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    VideoCrafter,
    Wan,
)

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SPEC = MixtureSpec(scales(4, 1))
PROMPTS = ["a red star", "a blue cross"]
UNWANTED = ["", "a plain star"]
CLIP, T5 = ("q_proj", "v_proj"), ("q", "v")
STEPS = 5


@dataclass(frozen=True)
class Case:
    """How a family is built and asked; ``is_split`` says that guidance calls its denoiser twice."""

    family: type[Family]
    make: Callable[[], Any]
    text_targets: dict[str, tuple[str, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    is_split: bool = False
    several: str | None = "num_images_per_prompt"
    encodings: int = 1


PICTURE = {"height": 16, "width": 16, "guidance_scale": 3.0}
TWO_CLIPS = {"text_encoder": CLIP, "text_encoder_2": CLIP}
CLEAN = {"clean_caption": False, "use_resolution_binning": False}
CLIPS = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0}
WAN = partial(
    Case, Wan, text_targets={"text_encoder": T5}, options=CLIPS, is_split=True, several="num_videos_per_prompt"
)

CASES = {
    "sd": Case(StableDiffusion, stable_diffusion, {"text_encoder": CLIP}, PICTURE),
    "sdxl": Case(StableDiffusionXL, stable_diffusion_xl, TWO_CLIPS, PICTURE),
    "sd3": Case(StableDiffusion3, stable_diffusion_3, {**TWO_CLIPS, "text_encoder_3": T5}, PICTURE),
    "sd3 without t5": Case(StableDiffusion3, partial(stable_diffusion_3, has_t5=False), TWO_CLIPS, PICTURE),
    "pixart": Case(PixArt, pixart, {"text_encoder": T5}, PICTURE | CLEAN),
    "flux": Case(
        Flux,
        flux,
        {"text_encoder": CLIP, "text_encoder_2": T5},
        {"height": 16, "width": 16, "guidance_scale": 1.0, "true_cfg_scale": 3.0},
        is_split=True,
        encodings=2,
    ),
    "video crafter": Case(VideoCrafter, tiny_video_crafter, {"text_encoder": CLIP}, CLIPS, several=None),
    "wan 2.1": WAN(make=tiny_wan),
    "wan 2.2": WAN(make=partial(tiny_wan, 0.5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def make_family(case: Case) -> Family:
    return case.family(case.make())


def make_bundle(case: Case, *, speaking: bool = True) -> Bundle:
    """Random experts on the denoisers and the text encoders; silent ones have B = 0."""
    family = make_family(case)
    networks = {**family.denoisers, **{name: family.text_encoders[name] for name in case.text_targets}}
    targets = {**dict.fromkeys(family.denoisers, ("to_q", "to_v")), **case.text_targets}
    mixture = Mixture.attach(networks, SPEC, targets, owned=family.owned_intervals)
    randomise(mixture)
    tensors = {k: v * (speaking or not k.endswith(".B")) for k, v in mixture.state_dict().items()}
    return Bundle(SPEC, tuple(mixture.layers), tensors, "route", "tiny", type(family.denoiser).__name__, {})


def draw(case: Case, pipeline: Any, per_prompt: int = 1, *, guided: bool = True, **options: Any) -> Tensor:
    """Latents for two prompts, as floats."""
    pipeline.set_progress_bar_config(disable=True)
    wanted = {**case.options, **options}
    if guided:
        wanted["negative_prompt"] = UNWANTED
    else:
        wanted["true_cfg_scale" if "true_cfg_scale" in wanted else "guidance_scale"] = 1.0
    if per_prompt > 1:
        wanted[str(case.several)] = per_prompt
    generator = [torch.Generator().manual_seed(seed) for seed in range(2 * per_prompt)]
    drawn = pipeline(prompt=PROMPTS, num_inference_steps=STEPS, generator=generator, output_type="latent", **wanted)
    return drawn[0]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser."""

    noisy: Tensor
    t: Tensor
    features: dict[str, Tensor]
    said: Tensor


class Calls(list[Call]):
    """Every call of a family's denoisers, as they hear it: after all hooks."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.handles = [d.register_forward_hook(self.note, with_kwargs=True) for d in family.denoisers.values()]

    def note(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
        noisy, said = next(iter(given.values())), output[0]
        if isinstance(self.family, Flux):
            noisy, said = (diffusers.FluxPipeline._unpack_latents(x, 16, 16, 2) for x in (noisy, said))
        flat = {**given, **(given.get("added_cond_kwargs") or {})}
        names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "text_embeds")
        features = {name: flat[name].clone() for name in names if isinstance(flat.get(name), Tensor)}
        t = timestep_input_of(denoiser).t_of(given["timestep"].reshape(-1).expand(len(noisy)))
        self.append(Call(noisy.clone(), t.clone(), features, said[:, : noisy.shape[1]].clone()))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def drawn_calls(case: Case, family: Family, per_prompt: int = 1, *, guided: bool = True) -> Calls:
    calls = Calls(family)
    draw(case, family.pipeline(), per_prompt, guided=guided)
    calls.stop()
    assert len(calls) == STEPS * (2 if case.is_split and guided else 1)
    return calls


def captions_of(case: Case, calls: Calls, per_prompt: int, *, guided: bool) -> Iterator[tuple[Call, list[str]]]:
    """Each call with the caption of each of its rows."""
    wanted, unwanted = ([c for c in captions for _ in range(per_prompt)] for captions in (PROMPTS, UNWANTED))
    for index, call in enumerate(calls):
        if not guided:
            yield call, wanted
        elif case.is_split:
            yield call, unwanted if index % 2 else wanted
        else:
            yield call, unwanted + wanted


@pytest.mark.parametrize(
    ("mode", "text_experts", "per_prompt", "guided"),
    [
        ("route", "step", 1, True),
        ("route", "step", 2, True),
        ("switch", "step", 1, False),
        ("switch", "interval", 2, True),
    ],
)
def test_every_row_is_its_captions_encoding_at_that_timestep(
    mode: str, text_experts: str, per_prompt: int, guided: bool, case: Case
) -> None:
    if per_prompt > 1 and case.several is None:
        pytest.skip(f"{case.family.pipeline_class.__name__} draws one clip per prompt")
    family = make_family(case)
    mixture = attach(family.pipeline(), make_bundle(case), mode, text_experts=text_experts)
    calls = drawn_calls(case, family, per_prompt, guided=guided)
    Reencoder.of(family.pipeline()).when = "off"  # from here on nothing renews what the family gives
    silent = {}
    met = set()
    for call, captions in captions_of(case, calls, per_prompt, guided=guided):
        tokens = family.tokenize(captions)
        with torch.no_grad():
            expected = family.features_at(tokens, call.t)
            said = family.predict(call.noisy, call.t, expected)
            with mixture.using("off"):
                silent = family.features_at(tokens, call.t)
        assert expected.keys() == call.features.keys()
        for name, value in expected.items():
            assert max_error(call.features[name].float(), value.float()) <= 1e-5, name
        changed = [name for name, value in silent.items() if max_error(value.float(), expected[name].float()) > 1e-4]
        assert changed == [name for name in silent if name != "encoder_attention_mask"]
        assert max_error(call.said, said) <= 1e-5 * max(1, said.abs().max().item())
        met.add(call.t[0].item())
    assert len(met) == STEPS


def test_text_experts_change_the_picture_and_off_silences_them(case: Case) -> None:
    pipeline = make_family(case).pipeline()
    drawn = {"none": draw(case, pipeline)}
    bundle = make_bundle(case)
    for text_experts in ("step", "interval", "off"):
        attach(pipeline, bundle, "switch", text_experts=text_experts)
        drawn[text_experts] = draw(case, pipeline)
        detach(pipeline)
    assert max_error(drawn["step"], drawn["interval"]) <= 1e-5 * drawn["step"].abs().max()  # when switching
    assert max_error(drawn["step"], drawn["off"]) > 1e-4
    assert max_error(drawn["off"], drawn["none"]) > 1e-4  # the denoiser's experts go on speaking
    assert torch.equal(draw(case, pipeline), drawn["none"])


def test_silent_text_experts_change_no_bit(case: Case) -> None:
    pipeline = make_family(case).pipeline()
    without = draw(case, pipeline)
    for mode, text_experts in (("switch", "interval"), ("route", "step")):
        attach(pipeline, make_bundle(case, speaking=False), mode, text_experts=text_experts)
        assert torch.equal(draw(case, pipeline), without), (mode, text_experts)
        detach(pipeline)


def test_texts_are_encoded_once_per_step_or_interval_and_kept(case: Case) -> None:
    family = make_family(case)
    pipeline = family.pipeline()
    attach(pipeline, make_bundle(case), "switch", text_experts="step")
    reencoder = Reencoder.of(pipeline)

    def passes(**options: Any) -> int:
        before = reencoder.num_text_passes
        draw(case, pipeline, **options)
        return reencoder.num_text_passes - before

    assert passes() == (1 + STEPS) * case.encodings
    assert passes() == case.encodings  # the same prompts: nothing but the pipeline's own
    calls = drawn_calls(case, family)
    intervals = {SPEC.strata.index_of(t) for t in {call.t[0].item() for call in calls}}
    reencoder.when = "interval"
    assert passes() == (1 + len(intervals)) * case.encodings
    assert passes() == case.encodings
    reencoder.when = "off"
    assert passes() == case.encodings
