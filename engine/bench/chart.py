"""The table as a picture: throughput, time to the first token, time between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench.errors import BenchError
from engine.bench.figures import RowFigures, Spread
from engine.bench.report import Report

_OURS, _THEIRS, _LIGHT = "#2f6f8f", "#c9803c", "#9cc3d5"


def draw(report: Report, path: Path) -> None:
    """Write a PNG. Raises BenchError when it cannot be written. matplotlib must be installed."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.kind != "prefill"] or report.rows
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    throughput, first, later = figure.subplots(1, 3)
    _throughput(throughput, rows, report)
    _times(first, rows, [row.ttft_ms for row in rows], "time to first token, ms")
    _times(later, rows, [row.itl_ms for row in rows], "time between tokens, ms")
    figure.suptitle(f"{report.model}, {report.dtype}: tokenmill bench")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise BenchError(f"--png: {str(path)!r} cannot be written: {error.strerror}") from None


def _throughput(axes: Any, rows: Sequence[RowFigures], report: Report) -> None:
    prefill = all(row.kind == "prefill" for row in rows)
    theirs = {one.label: one for one in report.transformers or ()}
    width = 0.4 if theirs else 0.7
    places = range(len(rows))
    ours = [row.prompt_tok_s if prefill else row.output_tok_s for row in rows]
    axes.bar([x - width / 2 * bool(theirs) for x in places], ours, width, color=_OURS, label="Tokenmill over HTTP")
    known = [(x, theirs[row.label]) for x, row in zip(places, rows, strict=True) if row.label in theirs]
    if known:
        heights = [one.prompt_tok_s if prefill else one.output_tok_s for _, one in known]
        axes.bar([x + width / 2 for x, _ in known], heights, width, color=_THEIRS, label="transformers")
        axes.legend()
    _finish(axes, rows, "prompt tokens a second" if prefill else "output tokens a second")


def _times(axes: Any, rows: Sequence[RowFigures], spreads: Sequence[Spread | None], title: str) -> None:
    known = [(x, times) for x, times in enumerate(spreads) if times is not None]
    axes.bar([x - 0.2 for x, _ in known], [times.p50 for _, times in known], 0.4, color=_OURS, label="p50")
    axes.bar([x + 0.2 for x, _ in known], [times.p99 for _, times in known], 0.4, color=_LIGHT, label="p99")
    if known:
        axes.legend()
    _finish(axes, rows, title)


def _finish(axes: Any, rows: Sequence[RowFigures], title: str) -> None:
    axes.set_xticks(range(len(rows)), [row.label for row in rows])
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
