"""Feed damaged files to everything that reads files: each is taken or refused, within bounds of time and memory.

python scripts/fuzz.py                  # 500 damaged copies of each kind of file
python scripts/fuzz.py --count 5000 --kind bundle
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from timestep_experts.config import load_recipe
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle, load_bundle, save_bundle
from timestep_experts.formats.experts import ExpertRecord, find_experts, write_expert
from timestep_experts.formats.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, asymmetric
from timestep_experts.models import BASE_ASSET, Family, load_family, read_meta_model, resolve_model

SECONDS, GIBIBYTES = 30, 6
"""Of one file: CPU time, and address space above that of the libraries."""
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
Damage = Callable[[random.Random, bytes], bytes]


# Damage


def _flip(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def _splice(draw: random.Random, content: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[end:] if draw.random() < 0.5 else content[:end] + content[start:]


def _replace_number(draw: random.Random, content: bytes) -> bytes:
    """Another number, word or bracket in the place of one in the text at the file's head."""
    head = content[:20_000]
    digits = [index for index, byte in enumerate(head) if chr(byte).isdigit()]
    if not digits:
        return _flip(draw, content)
    start = end = draw.choice(digits)
    while start and chr(head[start - 1]).isdigit():
        start -= 1
    while end < len(head) and chr(head[end]).isdigit():
        end += 1
    strange = ("0", "-1", "1e999", "NaN", "1000000", "99999999999999999999", "true", "null", '"x"', "[]", "{}", "0.5")
    return content[:start] + draw.choice(strange).encode() + content[end:]


def _drop_or_change_key(draw: random.Random, content: bytes) -> bytes:
    """JSON with a key gone, or of another type."""
    try:
        document = json.loads(content)
    except ValueError:
        return _replace_number(draw, content)
    node: Any = document
    while isinstance(node, dict) and node:
        key = draw.choice(list(node))
        if draw.random() < 0.4 or not isinstance(node[key], dict | list):
            if draw.random() < 0.3:
                del node[key]
            else:
                node[key] = draw.choice((None, True, -1, 10**9, 1e308, "x" * 1000, "\x1b[31m[bold]", [], {}, [[]] * 3))
            break
        node = node[key] if isinstance(node[key], dict) else {"": 0}
    return json.dumps(document).encode()


DAMAGES: tuple[Damage, ...] = (_flip, _cut, _splice, _replace_number, _replace_number, _drop_or_change_key)


# Readers


@cache
def family() -> Family:
    """The embedded base, loaded once in each process."""
    return load_family(resolve_model(BASE_ASSET), CPU)


def _read_recipe(folder: Path) -> None:
    load_recipe(folder / "recipe.yaml")


def _read_bundle(folder: Path) -> None:
    pipeline = family().pipeline()
    attach(pipeline, load_bundle(folder))
    detach(pipeline)


def _read_base(folder: Path) -> None:
    read_meta_model(str(folder))
    load_family(str(folder), CPU)


def _read_copies(folder: Path) -> None:
    find_experts(folder)


def _read_state(folder: Path) -> None:
    read_sealed_json(folder / "state.json")
    read_sealed_tensors(folder / "experts.safetensors")


READERS: dict[str, Callable[[Path], None]] = {
    "recipe": _read_recipe,
    "bundle": _read_bundle,
    "base": _read_base,
    "copies": _read_copies,
    "checkpoint": _read_state,
}


# Whole files


def make_whole(kind: str, folder: Path) -> None:
    """Write sound files of a kind."""
    if kind == "recipe":
        folder.mkdir()
        recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
        shutil.copy(recipes[0], folder / "recipe.yaml")
    elif kind == "bundle":
        save_bundle(_bundle(), folder)
    elif kind == "base":
        shutil.copytree(resolve_model(BASE_ASSET), folder)
    elif kind == "copies":
        _write_copies(folder)
    else:
        write_sealed_json(folder / "state.json", {"step": 7, "optimizer": {"0.step": 7.0}, "fingerprint": {"seed": 0}})
        write_sealed_tensors(folder / "experts.safetensors", {"a": torch.randn(3, 4), "b": torch.arange(3)})


def _bundle() -> Bundle:
    denoiser = family().denoiser
    scales = asymmetric([Scale(f"n{n}", Partition.uniform(n), rank=2, alpha=2) for n in (4, 1)])
    mixture = Mixture.attach(denoiser, MixtureSpec(scales), ["to_q", "to_v"])
    tensors = {name: value.clone() for name, value in mixture.state_dict().items()}
    mixture.detach()
    return Bundle(mixture.spec, tuple(mixture.layers), tensors, "route", BASE_ASSET, "UNet2DConditionModel", {})


def _write_copies(folder: Path) -> None:
    denoiser: Any = family().denoiser
    for index in range(2):
        record = ExpertRecord(index, (0.0, 500.0, 1000.0), BASE_ASSET, type(denoiser).__name__, 0)
        tensors = {"conv_in.weight": torch.randn(2, 3)}
        write_expert(folder / f"range-{index}" / "expert", denoiser.save_config, tensors, record, None)


# The run


def try_one(kind: str, whole: str, seed: int) -> tuple[str, str]:
    """Damage one file of a copy and read it, in this process; what came of it, and where a fault of ours lies."""
    draw = random.Random(f"{kind}{seed}")  # noqa: S311 - nothing is secret
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "files"
        shutil.copytree(whole, folder)
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.write_bytes(draw.choice(DAMAGES)(draw, path.read_bytes() or b"0"))
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                READERS[kind](folder)
        except (UserError, DamagedError):
            return "refused", ""
        except BaseException:
            return "fault", f"seed {seed}, {path.relative_to(folder)}: {traceback.format_exc(limit=-3)}"
        finally:
            signal.alarm(0)
    return "accepted", ""


def _prepare() -> None:
    """A worker's bounds: too much memory is a MemoryError, too much time an error of its own."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    torch.set_num_threads(1)
    family()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30,) * 2)


def main(
    count: Annotated[int, typer.Option(min=1, help="Damaged copies of each kind.")] = 500,
    kind: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(READERS)}; default: all.")] = None,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Feed damaged files to everything that reads files; exit code 1 if anything but a refusal comes of one."""
    family()
    table = Table("files", "damaged", "refused", "accepted", "faults")
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as home, multiprocessing.get_context("spawn").Pool(workers, _prepare) as pool:
        for name in kind or READERS:
            whole = Path(home) / name
            make_whole(name, whole)
            tasks = [(name, str(whole), first + index) for index in range(count)]
            outcomes = list(tqdm(pool.imap(_try, tasks), total=count, desc=name, unit="file"))
            counts = Counter(outcome for outcome, _ in outcomes)
            faults += [f"{name}: {where}" for outcome, where in outcomes if outcome == "fault"]
            table.add_row(name, f"{count:,}", *(f"{counts[o]:,}" for o in ("refused", "accepted", "fault")))
    console = Console()
    for fault in faults[:20]:
        console.print(fault, markup=False, highlight=False)
    console.print(table)
    raise typer.Exit(1 if faults else 0)


def _try(task: tuple[str, str, int]) -> tuple[str, str]:
    return try_one(*task)


if __name__ == "__main__":
    typer.run(main)
