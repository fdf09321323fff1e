"""The figures as a table for a person and as JSON for a program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.bench.errors import BenchError
from engine.bench.figures import RowFigures, Spread
from engine.bench.roofline import RooflineFigures
from engine.bench.transformers_run import TheirFigures

NOTHING = "–"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run has found. created: ISO 8601. options: the command line's, by name."""

    tokenmill: str
    created: str
    url: str
    model: str
    dtype: str
    threads: int | None
    options: dict[str, Any]
    rows: list[RowFigures]
    transformers: list[TheirFigures] | None
    roofline: RooflineFigures | None
    notes: list[str]


def table_text(report: Report) -> str:
    """The whole report for a terminal."""
    parts = [_headline(report), _table(_LOAD_HEADER, [_load_row(row) for row in report.rows]), *_notes(report)]
    if report.transformers is not None:
        parts += ["", "Against transformers in one process, the same prompts and number of tokens, in turn (tok/s)"]
        parts.append(_table(_RATIO_HEADER, list(_ratio_rows(report.rows, report.transformers))))
    if report.roofline is not None:
        parts += ["", *_roofline_lines(report.roofline)]
    return "\n".join(parts)


def write_json(report: Report, path: Path) -> None:
    """Raises BenchError when it cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise BenchError(f"--json: {str(path)!r} cannot be written: {error.strerror}") from None


_LOAD_HEADER = (
    "load", "requests", "prompt tok/s", "output tok/s", "total tok/s", "TTFT p50/p99 ms", "ITL p50/p99 ms",
    "latency p50/p99 ms",
)  # fmt: skip
_RATIO_HEADER = ("load", "figure", "Tokenmill over HTTP", "transformers", "ratio")
_ROOFLINE_HEADER = (
    "load", "bound by", "bound tok/s", "tok/s at median ITL", "of bound", "tok/s end to end", "of bound",
)  # fmt: skip


def _headline(report: Report) -> str:
    options = report.options
    threads = "" if report.threads is None else f", {_threads(report.threads)}"
    prompts = f"{options['prompt_tokens']} random ids in"
    if options["prompts"] is not None:
        prompts = f"prompts of {options['prompts']}"
    elif options["shared_prefix"]:
        prompts = f"{options['shared_prefix']} shared and {options['prompt_tokens']} own random ids in"
    way = "streamed" if options["stream"] else "not streamed"
    rounds = options["rounds"]
    medians = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    return (
        f"{report.model}, {report.dtype}{threads}, {report.url}\n"
        f"{prompts}, {options['output_tokens']} tokens out, {way}; rates are {medians}\n"
    )


def _load_row(row: RowFigures) -> list[str]:
    prefill = row.kind == "prefill"
    return [
        row.label,
        f"{row.requests}" + (f" x {len(row.rounds)}" if len(row.rounds) > 1 else ""),
        _rate(row.prompt_tok_s),
        NOTHING if prefill else _rate(row.output_tok_s),
        _rate(row.total_tok_s),
        _pair(row.ttft_ms),
        _pair(row.itl_ms),
        _pair(row.latency_ms),
    ]


def _notes(report: Report) -> Iterator[str]:
    rounds = [one for row in report.rows for one in row.rounds]
    wall, cpu = sum(one.wall_s for one in rounds), sum(one.client_cpu_s for one in rounds)
    tokens = sum(one.output_tokens for one in rounds)
    yield (
        f"The client used {cpu:.2f} s of CPU in {wall:.1f} s, {100 * cpu / wall:.1f} % of a core "
        f"({1e6 * cpu / tokens:.0f} µs an output token)."
    )
    prompt, cached = sum(one.prompt_tokens for one in rounds), sum(one.cached_tokens for one in rounds)
    if cached:
        yield f"{cached} of {prompt} prompt tokens came from the prefix cache."
    joined = [row for row in report.rows if row.tokens_per_event is not None and row.tokens_per_event > 1.01]
    for row in joined:
        yield f"{row.label}: {row.tokens_per_event:.2f} tokens an event; ITL is the time between events."
    yield from report.notes


def _ratio_rows(ours: Sequence[RowFigures], theirs: Sequence[TheirFigures]) -> Iterator[list[str]]:
    by_label = {one.label: one for one in theirs}
    for row in ours:
        other = by_label.get(row.label)
        if other is None:
            continue
        prefill = row.kind == "prefill"
        mine, yours = (row.prompt_tok_s, other.prompt_tok_s) if prefill else (row.output_tok_s, other.output_tok_s)
        name = "prompt tok/s" if prefill else "output tok/s"
        yield [row.label, name, _rate(mine), _rate(yours), f"{mine / yours:.2f}"]


def _roofline_lines(roofline: RooflineFigures) -> Iterator[str]:
    matmul = ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in roofline.matmul_flop_s.items())
    yield (
        f"This machine with {_threads(roofline.threads)} ({roofline.isa}): "
        f"reads {roofline.read_bytes_s / 1e9:.1f} GB/s, multiplies {matmul}"
    )
    yield (
        f"A decode step reads {roofline.weight_bytes_a_step / 1e6:.0f} MB of weights, "
        f"{roofline.kv_bytes_a_token / 1e3:.1f} kB of keys and values for each token of context, and multiplies "
        f"{roofline.parameters_a_token / 1e6:.0f} million parameters a token ({roofline.dtype})"
    )
    rows = [
        [
            row.label,
            row.bound_by,
            _rate(row.bound_tok_s),
            NOTHING if row.decode_tok_s is None else _rate(row.decode_tok_s),
            _percent(row.decode_fraction),
            _rate(row.end_to_end_tok_s),
            _percent(row.end_to_end_fraction),
        ]
        for row in roofline.rows
    ]
    yield _table(_ROOFLINE_HEADER, rows)
    yield "Median ITL: decode steps alone. End to end: the wall time of a round, prefill and all."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in lines)
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pair(times: Spread | None) -> str:
    return NOTHING if times is None else f"{_milliseconds(times.p50)} / {_milliseconds(times.p99)}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"
