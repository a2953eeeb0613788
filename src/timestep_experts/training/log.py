"""What a run leaves to look at: one JSON line per record, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from timestep_experts.formats.atomic import write_text

LOG = "log.jsonl"
"""In the folder of a stage: one record per line."""


class RunLog:
    """Writes ``log.jsonl`` and ``tensorboard/`` in a stage's folder; records after the resumed step are cut off.

    Args:
        folder: of the stage.
        start_step: the step from which the run goes on.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        path = folder / LOG
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [record for record in read_log(folder) if record["step"] <= start_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name, at an optimiser step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> RunLog:
        """Nothing to open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def training_cost(stages: Iterable[Path]) -> tuple[int, float]:
    """The samples and the seconds of finished stages, by their folders, all together."""
    samples, seconds = 0, 0.0
    for folder in stages:
        records = [record for record in read_log(folder) if "num_images_seen" in record]
        samples += int(records[-1]["num_images_seen"])
        seconds += sum(record["seconds"] for record in records)
    return samples, seconds


def read_log(folder: Path) -> list[dict[str, float]]:
    """The records of a stage's folder, in order; a line that is damaged or not whole is left out."""
    path = folder / LOG
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
