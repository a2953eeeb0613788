"""Names and their looks in figures: line styles, short module names, places for labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette without black and yellow (too pale on white), then two of Paul Tol's "muted" scheme.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)))
_MUTED_COLOUR = "#6b737b"
_SHORTER = (("_blocks", ""), ("_block", ""), ("transformer", "tf"), ("attentions", "attn"), ("resnets", "res"))


@dataclass(frozen=True)
class Style:
    """How a line looks: one colour per variant, one dash per mode or stage of it; the base is muted."""

    label: str
    colour: str
    dash: str | tuple[int, tuple[float, ...]]
    is_muted: bool


def line_styles(names: Sequence[str], muted: str) -> dict[str, Style]:
    """Styles by name: ``variant, mode``. Variants after the eighth repeat colours with other dashes."""
    variants: dict[str, int] = {}
    lines_of: dict[str, int] = {}
    styles = {}
    for name in names:
        if name == muted:
            styles[name] = Style(name, _MUTED_COLOUR, DASHES[0], is_muted=True)
            continue
        variant = name.partition(",")[0].strip()
        index = variants.setdefault(variant, len(variants))
        line = lines_of[variant] = lines_of.get(variant, -1) + 1
        dash = DASHES[(line + 2 * (index // len(PALETTE))) % len(DASHES)]
        styles[name] = Style(name, PALETTE[index % len(PALETTE)], dash, is_muted=False)
    return styles


def short_names(modules: Sequence[str]) -> list[str]:
    """Module names without the containers that all of them share, as long as they stay different.

    ``down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q`` becomes ``down.0.1.attn1.to_q``.
    """
    names = [module.split(".") for module in modules]
    shared = set.intersection(*(set(parts[1:]) for parts in names)) if len(names) > 1 else set()
    for word in sorted(word for word in shared if not word.isdigit()):
        for length in (2, 1):
            shorter = [_without(parts, word, length) for parts in names]
            if len({tuple(parts) for parts in shorter}) == len({tuple(parts) for parts in names}):
                names = shorter
                break
    return [_abbreviated(parts) for parts in names]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] as near as possible to the wanted ones, in their order and at least ``gap`` apart.

    With q_i = place_i - i * gap this is isotonic regression, solved by pooling neighbours that are out of order. Where
    there is no room for all, the gap shrinks.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        total, count = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            previous = pools.pop()
            total, count = total + previous[0], count + previous[1]
        pools.append((total, count))
    highest = 1 - (len(wanted) - 1) * gap
    level = [min(max(total / count, 0.0), highest) for total, count in pools for _ in range(count)]
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = level[rank] + rank * gap
    return places


def _without(parts: list[str], word: str, length: int) -> list[str]:
    """Leave a container out, with length 2 also its number; a word without a number behind it is no container."""
    at = parts.index(word, 1)
    if not (at + 1 < len(parts) and parts[at + 1].isdigit()):
        return parts
    return parts[:at] + parts[at + length :]


def _abbreviated(parts: list[str]) -> str:
    name = ".".join(parts)
    for long, short in _SHORTER:
        name = name.replace(long, short)
    return name
