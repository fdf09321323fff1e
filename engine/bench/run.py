"""`tokenmill bench`: from the options to the table."""

from __future__ import annotations

import datetime
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import msgspec

import engine
from engine.bench import roofline
from engine.bench.errors import BenchError
from engine.bench.options import BenchOptions
from engine.bench.others import OtherProcesses
from engine.bench.progress import Progress
from engine.bench.report import Report, table_text, write_json
from engine.bench.rounds import Runner, warm_up_of
from engine.bench.server import Facts, read_facts, target_of, vocab_size
from engine.bench.transformers_run import TransformersModel
from engine.bench.workload import Work, make_prompts, rows_of
from engine.config.command_line import shown_command


def bench(options: BenchOptions) -> int:
    """Run what was asked for and print it; returns the exit code. A server that was started is ended in any case."""
    works = rows_of(options)
    progress = Progress(_requests(options, works), quiet=options.quiet)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        report = _measure(options, works, progress)
        progress.close()
        print(table_text(report))
        if options.json is not None:
            write_json(report, options.json)
        if options.png is not None:
            from engine.bench.chart import draw  # matplotlib is an extra

            draw(report, options.png)
    except BenchError as error:
        progress.close()
        print(f"tokenmill bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _requests(options: BenchOptions, works: list[Work]) -> int:
    """All that will be sent, to the server and to transformers, for the progress bar."""
    total = 0
    for work in works:
        sides = 2 if options.against_transformers and work.kind != "poisson" else 1
        total += sides * (options.rounds * work.requests + options.warmup * warm_up_of(work).requests)
    return total


def _measure(options: BenchOptions, works: list[Work], progress: Progress) -> Report:
    progress.phase("connecting" if options.url is not None else "starting the server")
    with target_of(options) as (target, server):
        facts = read_facts(target, started_here=options.url is None)
        _check_length(facts, works)
        prompts = make_prompts(options, vocab_size(facts, options))
        machine = None
        if options.roofline:
            progress.phase("measuring this machine")
            machine = roofline.measure(facts)
        with _transformers(options, facts, progress) as theirs:
            runner = Runner(options, target, prompts, theirs, progress)
            others = None if server is None else OtherProcesses(server.pids.values())
            for number, work in enumerate(works):
                runner.run_row(work, number)
            busy = None if others is None else others.note()
    return Report(
        tokenmill=engine.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        url=target.url,
        model=facts.name,
        dtype=facts.dtype,
        threads=facts.threads,
        options=shown_options(options),
        rows=runner.rows,
        transformers=runner.their_rows if options.against_transformers else None,
        roofline=None if machine is None else roofline.reached(machine, facts, runner.rows),
        notes=[*runner.notes, *([] if busy is None else [busy])],
    )


def _check_length(facts: Facts, works: list[Work]) -> None:
    for work in works:
        total = work.prompt_tokens + work.output_tokens
        if facts.context_length is not None and total > facts.context_length:
            raise BenchError(
                f"{work.label}: {work.prompt_tokens} tokens of prompt and {work.output_tokens} of output are more than "
                f"the server's context of {facts.context_length}; lower --prompt-tokens, --output-tokens, "
                "--shared-prefix or --prefill"
            )


@contextmanager
def _transformers(options: BenchOptions, facts: Facts, progress: Progress) -> Iterator[TransformersModel | None]:
    if not options.against_transformers:
        yield None
        return
    progress.phase("loading the model into transformers")
    model = TransformersModel(facts)
    try:
        yield model
    finally:
        model.close()


def shown_options(options: BenchOptions) -> dict[str, Any]:
    """The options as JSON has them, without secrets."""
    shown = {name: getattr(options, name) for name in options.__dataclass_fields__}
    shown.pop("server")  # server_flags say the same
    shown["server_flags"] = shown_command(options.server_flags)
    shown["api_key"] = None if options.api_key is None else "***"
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(shown, enc_hook=str))
    return read
