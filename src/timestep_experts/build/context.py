"""The base, the pictures and the device of a run: what all its variants share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from timestep_experts.config import ClipsConfig, DecoupleConfig, MethodConfig, Recipe
from timestep_experts.data import (
    ClipSettings,
    Dataset,
    DecodeSettings,
    EncodedDataset,
    PictureSettings,
    encode_dataset,
    open_clips,
    open_dataset,
    split_by_caption,
)
from timestep_experts.data.sources import WORLD_PREFIX
from timestep_experts.errors import UserError
from timestep_experts.formats.dtypes import DTYPES
from timestep_experts.inference.sample import choose_scheduler
from timestep_experts.models import Family, load_family, resolve_model
from timestep_experts.models.sources import pipeline_sha256
from timestep_experts.world.scenes import parse_caption


@dataclass(frozen=True)
class RunContext:
    """What all variants of a recipe share.

    Args:
        family: the loaded base, without experts.
        train: the training pictures.
        validation: pictures that are not trained on.
        references: validation pictures as they are, for Frechet distances.
        decoding: how pictures or clips are decoded, none mirrored.
        prompts: the prompts that pictures are generated for.
        is_judged: whether the prompts are captions of the embedded world.
        base_sha256: who the base is, see `pipeline_sha256`.
    """

    family: Family
    train: EncodedDataset
    validation: EncodedDataset
    references: Dataset
    decoding: DecodeSettings
    prompts: tuple[str, ...]
    is_judged: bool
    base_sha256: str

    @property
    def shares_captions(self) -> bool:
        """Whether some captions occur in training and in validation pictures, as a trigger word does."""
        return not set(self.train.captions).isdisjoint(self.validation.captions)


def build_device(recipe: Recipe) -> torch.device:
    """The device to train and generate on.

    Raises:
        UserError: torch knows no such device.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"recipe.device: {name!r} cannot be used: {error}") from error


def build_base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the frozen base."""
    return DTYPES[recipe.training.base_dtype]


def build_family(recipe: Recipe) -> Family:
    """Load the base model.

    Raises:
        UserError: it cannot be loaded, or the recipe asks of it what it does not have.
    """
    training, source = recipe.training, resolve_model(recipe.pretrained_model_name_or_path)
    family = load_family(source, build_device(recipe), build_base_dtype(recipe), training.base_quantization)
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    if training.gradient_checkpointing:
        family.checkpoint_gradients()
    return family


def build_decode_settings(recipe: Recipe, default_num_frames: int | None, *, flip: bool) -> DecodeSettings:
    """How pictures, or the clips of a video base, are decoded.

    Args:
        recipe: says how.
        default_num_frames: of the base (`Family.default_num_frames`); ``None`` for one that generates pictures.
        flip: keep mirrored copies.

    Raises:
        UserError: the recipe says how to read clips, but the base generates pictures.
    """
    height, width = recipe.resolution
    if default_num_frames is not None:
        clips = recipe.data.clips or ClipsConfig()
        return ClipSettings(clips.num_frames or default_num_frames, height, width, clips.fps, clips.stride, flip)
    if recipe.data.clips is not None:
        raise UserError(f"recipe.data.clips: {recipe.pretrained_model_name_or_path} generates pictures, not clips")
    return PictureSettings(height, width, flip)


def build_datasets(recipe: Recipe, *, is_video: bool = False) -> tuple[Dataset, Dataset]:
    """Training and validation pictures, or clips."""
    data = recipe.data
    find = open_clips if is_video else partial(open_dataset, seed=recipe.seed)
    found = find(data.path, max_samples=data.max_train_samples)
    if data.validation_path is not None:
        return found, find(data.validation_path, max_samples=data.max_validation_samples)
    if data.path.startswith(WORLD_PREFIX):
        limit = data.max_validation_samples or 512
        return found, open_dataset(data.path, max_samples=limit, seed=recipe.seed + 1, held_out=True)
    train, validation = split_by_caption(found, data.validation_share, recipe.seed)
    return train, Dataset(validation.examples[: data.max_validation_samples], validation.skipped)


def build_context(recipe: Recipe, datasets: tuple[Dataset, Dataset] | None = None) -> RunContext:
    """Load, read and encode what the variants share.

    Args:
        recipe: of the run.
        datasets: what `build_datasets` found, if it was asked already.

    Raises:
        UserError: the base, the data or the prompts are not usable.
    """
    family = build_family(recipe)
    decoding = build_decode_settings(recipe, family.default_num_frames, flip=False)
    family.check_size(recipe.resolution, decoding.num_frames if isinstance(decoding, ClipSettings) else None)
    train, validation = datasets or build_datasets(recipe, is_video=family.is_video)
    cache = recipe.output_dir / "cache"
    settings = build_decode_settings(recipe, family.default_num_frames, flip=recipe.data.flip)
    prompts = build_prompts(recipe, validation)
    is_judged = _is_judged(recipe, prompts)
    choose_scheduler(recipe.evaluation.scheduler, family.pipeline().scheduler)  # fails before hours of training
    as_tokens = any(_trains_text_encoders(variant.method) for variant in recipe.all_variants)
    return RunContext(
        family=family,
        train=encode_dataset(train, settings, family, cache, as_tokens=as_tokens),
        validation=encode_dataset(validation, decoding, family, cache, as_tokens=as_tokens),
        references=validation,
        decoding=decoding,
        prompts=prompts,
        is_judged=is_judged,
        base_sha256=pipeline_sha256(resolve_model(recipe.pretrained_model_name_or_path), cache / "hashes.json"),
    )


def _trains_text_encoders(method: MethodConfig) -> bool:
    return not isinstance(method, DecoupleConfig) and method.experts.text_target_modules is not None


def build_validation(recipe: Recipe, family: Family, *, as_tokens: bool = False) -> EncodedDataset:
    """The validation pictures alone, encoded, for jobs that neither train nor generate.

    Args:
        recipe: says which.
        family: the loaded base.
        as_tokens: keep captions as token ids, for text encoders that change.

    Raises:
        UserError: the data is not usable.
    """
    decoding = build_decode_settings(recipe, family.default_num_frames, flip=False)
    _, validation = build_datasets(recipe, is_video=family.is_video)
    return encode_dataset(validation, decoding, family, recipe.output_dir / "cache", as_tokens=as_tokens)


def build_prompts(recipe: Recipe, validation: Dataset) -> tuple[str, ...]:
    """What pictures are generated for: the recipe's prompts, or different captions of the validation set.

    Raises:
        UserError: the file of prompts is not there, or is not UTF-8 text.
    """
    wanted = recipe.evaluation.prompts
    if isinstance(wanted, Path):
        if not wanted.is_file():
            raise UserError(f"recipe.evaluation.prompts: no file {wanted}")
        wanted = _read_prompts(wanted)
    if wanted is None:
        wanted = tuple(dict.fromkeys(example.caption for example in validation.examples))
    return wanted[: recipe.evaluation.num_prompts]


def _read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe.evaluation.prompts: {path} is not UTF-8 text: {error}") from error
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _is_judged(recipe: Recipe, prompts: tuple[str, ...]) -> bool:
    if recipe.evaluation.judge == "off":
        return False
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except ValueError:
        if recipe.evaluation.judge == "scenes":
            raise
        return False
    return bool(prompts)
