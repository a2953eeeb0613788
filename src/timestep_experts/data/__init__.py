"""Pictures and clips with captions: found, checked, encoded once, kept."""

from timestep_experts.data.cache import (
    DecodeSettings,
    EncodedDataset,
    PictureSettings,
    decode_all,
    encode_dataset,
    halves_by_caption,
)
from timestep_experts.data.clips import ClipSettings, open_clips
from timestep_experts.data.sources import Dataset, Example, Skipped, open_dataset, split_by_caption

__all__ = [
    "ClipSettings",
    "Dataset",
    "DecodeSettings",
    "EncodedDataset",
    "Example",
    "PictureSettings",
    "Skipped",
    "decode_all",
    "encode_dataset",
    "halves_by_caption",
    "open_clips",
    "open_dataset",
    "split_by_caption",
]
