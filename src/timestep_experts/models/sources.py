"""Where a base comes from: a folder, a file or the hub; whether it is there, and who it is by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id  # re-exported, but not for type checkers

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import write_json
from timestep_experts.formats.checkpoints import file_sha256

INDEX = "model_index.json"
_SECONDS = 5
_WEIGHTS = (".safetensors", ".bin")
_DECIDING = (*_WEIGHTS, "config.json", "scheduler_config.json", INDEX)


def require_source(source: str) -> None:
    """See that a base is where it is said to be, in seconds; libraries would try for half a minute.

    Args:
        source: a folder, a ``.safetensors`` file or a hub id.

    Raises:
        UserError: it is not; says where was looked.
    """
    if Path(source).exists() or isinstance(try_to_load_from_cache(source, INDEX) if is_hub_id(source) else None, str):
        return
    if not is_hub_id(source):
        raise UserError(f"cannot load a pipeline from {source!r}: there is no such file or folder")
    looked = f"there is no folder of that name in {Path.cwd()}, no copy of such a model in the hub's local cache"
    try:
        HfApi().model_info(source, timeout=_SECONDS)
    except RepositoryNotFoundError:
        raise UserError(f"cannot load a pipeline from {source!r}: {looked}, and none on the hub") from None
    except Exception as error:  # of whichever library speaks to the network
        raise UserError(
            f"cannot load a pipeline from {source!r}: {looked}, and the hub cannot be asked ({error})"
        ) from error


def is_hub_id(source: str) -> bool:
    """Whether a name could be that of a model or a dataset on the hub."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def weights_variant(folder: Path, part: str) -> str | None:
    """The variant (``fp16``) in whose files alone a part of a pipeline is saved; ``None``: it has ordinary ones.

    Args:
        folder: of a pipeline.
        part: the name of a network in it.
    """
    stems = [path.name.removesuffix(".safetensors") for path in sorted((folder / part).glob("*.safetensors"))]
    bare = [stem.split("-0")[0] for stem in stems]  # shards are named <stem>-00001-of-00002
    if not bare or any("." not in stem for stem in bare):
        return None
    return bare[0].rpartition(".")[2]


def pipeline_sha256(source: str, known: Path | None = None) -> str:
    """Who a base is: one hash of the weights and configurations of all its parts, wherever it lies.

    Args:
        source: see `require_source`.
        known: a JSON file that remembers hashes by size and time of change, so that gigabytes are read once.
    """
    home = _home(source)
    remembered = _read_known(known)
    digest = hashlib.sha256()
    for name, file in sorted(_deciding_files(home)):
        digest.update(f"{_hash(file, remembered)}  {name}\n".encode())
    if known is not None:
        write_json(known, remembered)
    return digest.hexdigest()


def _home(source: str) -> Path:
    """The folder or file; of a hub id, the snapshot that was downloaded."""
    if Path(source).exists():
        return Path(source)
    found = try_to_load_from_cache(source, INDEX)
    if not isinstance(found, str):
        raise UserError(f"the files of {source!r} are not in the hub's local cache")
    return Path(found).parent


def _deciding_files(home: Path) -> Iterator[tuple[str, Path]]:
    if home.is_file():
        yield home.suffix, home
        return
    for path in home.iterdir():
        for file in (path,) if path.is_file() else path.iterdir() if path.is_dir() else ():
            if file.name.endswith(_DECIDING) and file.is_file():
                yield file.relative_to(home).as_posix(), file


def _hash(file: Path, known: dict[str, Any]) -> str:
    state = file.stat()
    mark = [state.st_size, state.st_mtime_ns]
    entry = known.get(str(file.resolve()))
    if not isinstance(entry, Mapping) or entry.get("file") != mark:
        entry = known[str(file.resolve())] = {"file": mark, "sha256": file_sha256(file)}
    return str(entry["sha256"])


def _read_known(path: Path | None) -> dict[str, Any]:
    try:
        document = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
