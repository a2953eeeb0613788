"""One process at a time in a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from timestep_experts.errors import UserError

_LOCK = ".lock"


@contextmanager
def only_process_in(folder: Path, *, waits: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing.

    Args:
        folder: that only one process may write to.
        waits: wait for another process to leave, rather than refuse.

    Raises:
        UserError: another process works there, or the folder cannot be written to.
    """
    owner, lock = folder / f"{_LOCK}-owner", FileLock(folder / _LOCK, timeout=-1 if waits else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        raise UserError(
            f"another run works in {folder}{_name(owner)}; wait until it ends, or choose another output_dir"
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _name(owner: Path) -> str:
    try:
        return f" ({owner.read_text(encoding='utf-8')})"
    except OSError:
        return ""
