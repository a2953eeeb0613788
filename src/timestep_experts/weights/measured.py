"""A base model and the pictures that losses are measured on, for whoever tries weights on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timestep_experts.data import EncodedDataset
from timestep_experts.evaluation import LossSettings
from timestep_experts.evaluation.merges import MergeSplit
from timestep_experts.intervals import Partition
from timestep_experts.models import Family


@dataclass(frozen=True)
class MeasuredBase:
    """Where a base and its pictures come from; nothing is loaded before it is asked for.

    Args:
        source: the base as the user named it: a folder, a file or a hub id.
        load: loads it.
        load_pictures: reads and encodes the validation pictures; whether captions are kept as tokens is its second
            argument, for text encoders that change.
        loss_settings: how losses are measured, given the intervals by which they are reported.
        seed: of halves of the pictures, where no other is given.
    """

    source: str
    load: Callable[[], Family]
    load_pictures: Callable[[Family, bool], EncodedDataset]
    loss_settings: Callable[[Partition], LossSettings]
    seed: int

    def split(self, family: Family, partition: Partition, seed: int, *, as_tokens: bool = False) -> MergeSplit:
        """One half of the pictures to choose by, the other to confirm on.

        Raises:
            UserError: there are too few pictures.
        """
        dataset = self.load_pictures(family, as_tokens)
        return MergeSplit.on_halves(family, dataset, self.loss_settings(partition), seed)
