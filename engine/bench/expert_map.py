"""`tokenmill experts plot`: how often each expert of each layer was chosen, as a picture."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.bench.errors import BenchError
from engine.config.command_line import BriefParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("layer_id", "expert_id", "count")


def plot_experts(words: Sequence[str]) -> int:
    """The command `tokenmill experts`; returns its exit code. Mistakes end the process with code 2."""
    parser = BriefParser(prog="tokenmill experts", description="Look at what /dump_expert_distribution_record wrote.")
    plot = parser.add_subparsers(dest="action", required=True, metavar="plot").add_parser(
        "plot", help="draw a heat map, layer by expert", description="Draw a heat map, layer by expert."
    )
    plot.add_argument("file", type=Path, metavar="FILE", help="a CSV file of the modes stat or per_pass")
    plot.add_argument("--out", type=Path, metavar="PNG", help="where to write it; default: FILE with .png behind it")
    options: argparse.Namespace = parser.parse_args(list(words))
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("needs matplotlib, which is not installed: pip install 'tokenmill[bench]'")
    out: Path = options.out or options.file.with_name(options.file.name + ".png")
    try:
        layers, counts = read_counts(options.file)
        draw(layers, counts, options.file.name, out)
    except BenchError as error:
        sys.exit(f"error: {error}")
    print(f"{len(layers)} layers of {counts.shape[1]} experts: {out}")
    return 0


def read_counts(path: Path) -> tuple[list[int], NDArray[np.int64]]:
    """The layers' numbers, ascending, and counts [layers, experts]: summed over all forward passes of the file.

    Raises BenchError for a file that has no counts.
    """
    counts: dict[tuple[int, int], int] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise BenchError(f"{str(path)!r} has not the columns {', '.join(COLUMNS)}")
            for row in rows:
                layer, expert, count = (int(row[name]) for name in COLUMNS)
                if layer < 0 or expert < 0 or count < 0:
                    raise BenchError(f"{str(path)!r}, line {rows.line_num}: has a number below 0")
                counts[layer, expert] = counts.get((layer, expert), 0) + count
    except OSError as error:
        raise BenchError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise BenchError(f"{str(path)!r}, line {rows.line_num}: has something else than whole numbers") from None
    if not counts:
        raise BenchError(f"{str(path)!r} has no lines: the model has no experts")
    layers = sorted({layer for layer, _ in counts})
    table = np.zeros((len(layers), 1 + max(expert for _, expert in counts)), np.int64)
    for (layer, expert), count in counts.items():
        table[layers.index(layer), expert] = count
    return layers, table


def draw(layers: Sequence[int], counts: NDArray[np.int64], title: str, out: Path) -> None:
    """Write a PNG. Raises BenchError when it cannot be written. matplotlib must be installed."""
    figure = heat_map(layers, counts, title)
    try:
        figure.savefig(out, dpi=120, format="png")
    except OSError as error:
        raise BenchError(f"{str(out)!r} cannot be written: {error.strerror}") from None


def heat_map(layers: Sequence[int], counts: NDArray[np.int64], title: str) -> Figure:
    """Each layer's counts as shares of an even distribution: 1 is an expert's fair share."""
    from matplotlib.figure import Figure

    fair = np.maximum(counts.sum(axis=1, keepdims=True), 1) / counts.shape[1]
    figure = Figure(
        figsize=(min(16.0, 3.5 + 0.12 * counts.shape[1]), min(12.0, 2.2 + 0.22 * len(layers))), layout="constrained"
    )
    axes = figure.subplots()
    picture = axes.imshow(counts / fair, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0)
    step = max(1, len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"{title}\n{int(counts.sum())} choices of experts", fontsize=9)
    figure.colorbar(picture, label="times its fair share")
    return figure
