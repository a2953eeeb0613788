"""Pictures with captions: found, checked, encoded once, kept."""

from timestep_experts.data.cache import EncodedPictures, PictureSettings, encode_dataset
from timestep_experts.data.sources import Example, PictureSet, Skipped, open_dataset, split_by_caption

__all__ = [
    "EncodedPictures",
    "Example",
    "PictureSet",
    "PictureSettings",
    "Skipped",
    "encode_dataset",
    "open_dataset",
    "split_by_caption",
]
