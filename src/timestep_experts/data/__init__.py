"""Pictures and clips with captions: found, checked, encoded once, kept."""

from timestep_experts.data.cache import (
    EncodedPictures,
    MediaSettings,
    PictureSettings,
    decode_all,
    encode_dataset,
    halves_by_caption,
)
from timestep_experts.data.clips import ClipSettings, open_clips
from timestep_experts.data.sources import Example, PictureSet, Skipped, open_dataset, split_by_caption

__all__ = [
    "ClipSettings",
    "EncodedPictures",
    "Example",
    "MediaSettings",
    "PictureSet",
    "PictureSettings",
    "Skipped",
    "decode_all",
    "encode_dataset",
    "halves_by_caption",
    "open_clips",
    "open_dataset",
    "split_by_caption",
]
