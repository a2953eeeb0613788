"""Whether the files of a base model are what they claim to be, before libraries fill the gaps with random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from timestep_experts.errors import UserError

_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_PARTS_OF_STABLE_DIFFUSION = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")
_MOST_LAYERS, _MOST_OF_ANYTHING = 1000, 10**7
_TELLTALES = {
    ".experts.": "a mixture of timestep experts",
    "lora": "a LoRA",
    "conditioner.embedders.": "Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "conv_in.weight": "one network of a pipeline",
}
"""What the names of a file's tensors betray, the first that fits."""


def check_folder(folder: Path, pipeline_class: Any, needed: Iterable[str], unused: Iterable[str] = ()) -> None:
    """Refuse an incomplete folder in the diffusers layout, and one whose subfolders hold other classes than it says.

    Args:
        folder: with a ``model_index.json``.
        pipeline_class: the pipeline that it is to be loaded as.
        needed: the parts without which it is of no use; one may be listed as left out.
        unused: parts that are not loaded, so that they may be missing.

    Raises:
        UserError: naming the part, what is there and what is expected.
    """
    index = {name: value for name, value in pipeline_class.load_config(folder).items() if isinstance(value, list)}
    listed = {name: kind for name, (library, kind) in index.items() if library is not None}
    known, _ = pipeline_class._get_signature_keys(pipeline_class)  # noqa: SLF001
    lacking, strange = sorted(set(needed) - index.keys()), sorted(listed.keys() - set(known))
    if lacking or strange:
        said = [f"lists no {', '.join(lacking)}"] * bool(lacking) + [f"lists {', '.join(strange)}"] * bool(strange)
        raise UserError(f"model_index.json {' and '.join(said)}; a {pipeline_class.__name__} has {', '.join(known)}")
    for name in listed.keys() - set(unused):
        _check_part(folder / name, listed[name])


def check_configurations(folder: Path) -> None:
    """Refuse what would hang or fill the memory when a library reads it: pipes, devices, and absurd sizes.

    Args:
        folder: of a pipeline; anything else is not looked at.

    Raises:
        UserError: naming the file, and the key.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"cannot load a pipeline from {str(folder)!r}: {path} is neither a file nor a folder")
    for path in folder.glob("*/config.json"):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot load a pipeline from {str(folder)!r}: {path} is no JSON: {error}") from error
        for key, value in document.items() if isinstance(document, dict) else ():
            most = _MOST_LAYERS if "layer" in key and "epsilon" not in key else _MOST_OF_ANYTHING
            if isinstance(value, int) and value > most:
                raise UserError(
                    f"cannot load a pipeline from {str(folder)!r}: {path} says {key}: {value:,}; at most {most:,} is"
                    " believed"
                )


def _check_part(folder: Path, kind: str) -> None:
    if not folder.is_dir():
        raise UserError(f"model_index.json lists a {kind}, but there is no folder {folder}")
    found = [path for name in _CONFIGS if (path := folder / name).is_file()]
    if not found and "Tokenizer" in kind:
        return
    if not found:
        raise UserError(f"{folder} has no configuration of its {kind}; expected {' or '.join(_CONFIGS)}")
    try:
        config = json.loads(found[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{found[0]} is no readable JSON: {error}") from error
    if found[0].name != "config.json":
        return
    holds = _other_class(config, kind)
    if holds:
        raise UserError(f"{folder} holds a {holds}; model_index.json says {kind}")
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise UserError(f"{folder} has no weights of its {kind}; expected {' or '.join(_WEIGHTS)}")


def _other_class(config: Mapping[str, Any], kind: str) -> str | None:
    """The class that a configuration is of, if it is another one; CLIP's whole may stand for its text part."""
    name = config.get("_class_name", kind)
    if name != kind:
        return str(name)
    wanted = getattr(getattr(transformers, kind, None), "config_class", None)
    found = config.get("model_type")
    if wanted is None or found is None or wanted.model_type == found or wanted.model_type.startswith(f"{found}_"):
        return None
    return str((config.get("architectures") or [found])[0])


def check_weights(folder: Path, networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks some of whose parameters their files do not hold: transformers leaves them random.

    Args:
        folder: of the pipeline; a network without safetensors files is not checked.
        networks: as loaded from there, by name. Files may put prefixes before names or leave them out.

    Raises:
        UserError: naming the first few of them.
    """
    for name, module in networks.items():
        missing = _missing(folder / name, module)
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"{folder / name} lacks {len(missing)} parameters of its {type(module).__name__}: {shown}")


def _missing(folder: Path, module: nn.Module) -> list[str]:
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]  # as diffusers leaves them
    stored = {ending for path in folder.glob("*.safetensors") for key in _keys(path) for ending in _endings(key)}
    if empty or not stored or not type(module).__module__.startswith("transformers."):
        return empty
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return [names[0] for names in aliases.values() if not any(stored.intersection(_endings(n)) for n in names)]


def _endings(name: str) -> set[str]:
    """A name, and the same without its first one or two parts, as long as it still says which layer."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(min(3, len(parts) - 1)) if not parts[i].isdigit()}


def check_single_file(path: Path) -> None:
    """Refuse a ``.safetensors`` file that is no whole Stable Diffusion 1.x or 2.x.

    Raises:
        UserError: saying what it seems to be.
    """
    try:
        keys = _keys(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"it is no readable safetensors file: {error}") from error
    if all(any(key.startswith(part) for key in keys) for part in _PARTS_OF_STABLE_DIFFUSION):
        return
    guess = next((what for mark, what in _TELLTALES.items() if any(mark in key for key in keys)), None)
    holds = guess or ", ".join(keys[:3]) or "nothing"
    raise UserError(
        f"it seems to hold {holds}; a single file must be a whole Stable Diffusion 1.x or 2.x, with tensors under"
        f" {', '.join(_PARTS_OF_STABLE_DIFFUSION)}; any other base must be a folder in the diffusers layout"
    )


def _keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return sorted(opened.keys())
