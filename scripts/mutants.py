"""Change one operator or constant of the sources at a time, and see whether a test notices.

    python scripts/mutants.py --count 100 --seed 0      # of the rooms with formulas, chosen at random
    python scripts/mutants.py --count 20 --room merging

Mutants are made by cosmic-ray (``pip install cosmic-ray``). Each is tried by the tests of its room alone, so a
survivor may still be killed by the whole suite: try that before a test is written for it.
"""

from __future__ import annotations

import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SECONDS = 900
TESTS = {
    "mixture": (
        *("laws/test_reference_values.py", "laws/test_mixture_laws.py", "laws/test_fusing_laws.py"),
        *("laws/test_text_experts.py", "families/test_base_facts.py", "parity/test_peft.py"),
        *("faults/test_mixture_faults.py", "parity/test_neighbours.py"),
    ),
    "training": (
        *("laws/test_reference_values.py", "laws/test_training_laws.py", "laws/test_decouple_laws.py"),
        *("laws/test_distill_laws.py", "laws/test_optimisers.py", "faults/test_not_finite.py"),
        *("faults/test_run_faults.py", "families/test_memory.py"),
    ),
    "merging": (
        *("laws/test_merging_laws.py", "laws/test_lowrank_merging_laws.py", "laws/test_projection_laws.py"),
        *("laws/test_search_laws.py", "laws/test_reference_values.py", "parity/test_merge_utils.py"),
        *("test_merge.py", "test_search.py", "test_analyse.py"),
    ),
    "objectives": (
        *("laws/test_reference_values.py", "laws/test_distill_laws.py", "laws/test_decouple_laws.py"),
        *("laws/test_training_laws.py",),
    ),
}
NOT_TRIED = "not compiled and not sampler_has and not begin and not dry"
"""Tests that compile for minutes, or try whole commands."""
UNFIT = ("Decorator", "ExceptionReplacer", "Variable", "BitOr")
"""Operators that change what no formula is made of (unions of types), or want to be told names."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Args:
        room: the folder under the package.
        path: of the file, below the repository.
        operator: cosmic-ray's.
        occurrence: which of the operator's places in the file.
    """

    room: str
    path: Path
    operator: str
    occurrence: int

    def sources(self) -> tuple[str, str]:
        """The file before and after."""
        before = (ROOT / self.path).read_text(encoding="utf-8")
        after: str = mutate_code(before, get_operator(self.operator)(), self.occurrence)
        return before, after

    def difference(self) -> str:
        """What changes, line by line."""
        before, after = (source.splitlines() for source in self.sources())
        lines = difflib.unified_diff(before, after, str(self.path), "", n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith("+++"))


class _Counter(Visitor):
    """Counts the places of an operator."""

    def __init__(self, operator: Any) -> None:
        self.operator, self.count = operator, 0

    def visit(self, node: Any) -> Any:
        self.count += sum(1 for _ in self.operator.mutation_positions(node))
        return node


def mutants_of(room: str) -> list[Mutant]:
    """All mutants of a room, but for those of the texts of errors and of type annotations that nothing evaluates."""
    found = []
    for path in sorted((ROOT / "src" / "timestep_experts" / room).rglob("*.py")):
        tree = get_ast(path.read_text(encoding="utf-8"))
        for name in operator_names():
            if any(word in name for word in UNFIT):
                continue
            counter = _Counter(get_operator(name)())
            counter.walk(tree)
            found += [Mutant(room, path.relative_to(ROOT), name, index) for index in range(counter.count)]
    return found


def is_noticed(mutant: Mutant, home: Path) -> bool:
    """Whether a test fails with the mutant in a copy of the repository."""
    before, after = mutant.sources()
    target = home / mutant.path
    target.write_text(after, encoding="utf-8")
    tests = [f"tests/{name}" for name in TESTS[mutant.room]]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", "-k", NOT_TRIED]
    environment = os.environ | {"PYTHONPATH": str(home / "src"), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603 - pytest on our own files
            [*command, *tests], cwd=home, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(before, encoding="utf-8")


def main(
    count: Annotated[int, typer.Option(min=1, help="Mutants to try.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    room: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TESTS)}; default: all.")] = None,
) -> None:
    """Try mutants that are chosen at random; print those that no test of their room notices."""
    everything = [mutant for name in room or TESTS for mutant in mutants_of(name)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))  # noqa: S311 - nothing is secret
    console, tried, killed = Console(), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "copy"
        shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "runs", "work"))
        for number, mutant in enumerate(chosen, 1):
            noticed = is_noticed(mutant, home)
            tried[mutant.room] += 1
            killed[mutant.room] += noticed
            said = "killed" if noticed else f"SURVIVED\n{mutant.difference()}"
            console.print(f"{number} of {len(chosen)}, {mutant.path}: {said}", markup=False, highlight=False)
    table = Table("room", "mutants", "tried", "killed", "share")
    for name in room or TESTS:
        there = sum(mutant.room == name for mutant in everything)
        share = f"{killed[name] / tried[name]:.0%}" if tried[name] else ""
        table.add_row(name, f"{there:,}", str(tried[name]), str(killed[name]), share)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
