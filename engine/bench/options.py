"""The command line of `tokenmill bench`."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.http_client import parse_url
from engine.config import ServerConfig
from engine.config.command_line import BriefParser, parse_serve
from engine.config.flags import token_count

_MOST = 1_000_000
_MOST_CLIENTS = 4096


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What was asked for; docs/bench.md says what each means.

    url: None: a server is started, with `server_flags`, which say what `server` says.
    concurrency, request_rates: one row of the table each. prefill: tokens of a prompt of the prefill row; None: no row.
    """

    url: str | None
    api_key: str | None
    server_flags: tuple[str, ...]
    server: ServerConfig
    concurrency: tuple[int, ...]
    requests_per_client: int
    request_rates: tuple[float, ...]
    num_requests: int
    prefill: int | None
    prompt_tokens: int
    output_tokens: int
    prompts: Path | None
    shared_prefix: int
    vocab_size: int | None
    stream: bool
    rounds: int
    warmup: int
    seed: int
    timeout: float
    roofline: bool
    against_transformers: bool
    json: Path | None
    png: Path | None
    quiet: bool


def parse_bench(argv: Sequence[str]) -> BenchOptions:
    """Parse the words behind `tokenmill bench`; those behind `--` are flags of the server that it starts.

    What cannot be run ends the process with exit code 2 and a message on stderr that names the option, the value and
    what is allowed.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    given = vars(parser.parse_args(words[:cut]))
    named = [word for name in ("model_path", "dtype") for word in _flag(name, given.pop(name))]
    flags = [*named, *words[cut + 1 :]]
    if given["url"] is not None and flags:
        parser.error(f"argument --url: {given['url']!r}: a running server takes no flags, but {flags} were given")
    if not given["concurrency"] and not given["request_rates"]:
        given["concurrency"] = (1,) if given["prefill"] is None else ()
    options = BenchOptions(server_flags=tuple(flags), server=parse_serve(flags).config, **given)
    problem = _problem(options)
    if problem is not None:
        parser.error(f"argument {problem}")
    return options


def _flag(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", value]


def _problem(options: BenchOptions) -> str | None:
    """What does not go together, or is missing on this machine; None: nothing."""
    if options.prompts is not None and not options.prompts.is_file():
        return f"--prompts: {str(options.prompts)!r}: there is no such file"
    if options.prompts is not None and options.shared_prefix:
        return f"--shared-prefix: {options.shared_prefix}: the prompts of --prompts are sent as they are; allowed is 0"
    for name, path in (("--json", options.json), ("--png", options.png)):
        if path is not None and not path.absolute().parent.is_dir():
            return f"{name}: {str(path)!r}: the folder {path.absolute().parent} does not exist"
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        return f"--png: {str(options.png)!r}: needs matplotlib, which is not installed: pip install 'tokenmill[bench]'"
    if options.roofline and options.url is not None and not _is_here(options.url):
        return f"--roofline: {options.url} is not on this machine, whose limits would be measured"
    if options.against_transformers:
        if importlib.util.find_spec("transformers") is None:
            return "--against-transformers: transformers is not installed: pip install transformers accelerate"
        if options.server.load_format == "dummy":
            return "--against-transformers: --load-format dummy has random weights that transformers cannot read"
    return None


def _is_here(url: str) -> bool:
    host = parse_url(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == ()
        return action.help if silent else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = BriefParser(
        prog="tokenmill bench",
        usage="%(prog)s [--option value ...] [-- FLAGS OF THE SERVER]",
        description="Measure a running server (--url) or one that is started for it, with the flags behind `--`.",
        formatter_class=_Help,
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--url", type=_url, metavar="URL", help="a running server; without it one is started")
    server.add_argument("--api-key", metavar="KEY", help="bearer token of the server at --url")
    server.add_argument("--model-path", "--model", metavar="MODEL", help="of the server that is started")
    server.add_argument("--dtype", metavar="DTYPE", help="of the server that is started")
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--concurrency", type=_list_of(_whole(1, _MOST_CLIENTS)), default=(), metavar="N,N,...",
        help="closed loop: so many clients, each with its next request when the last is answered; one row each "
        "(1, if there is no --request-rate and no --prefill)",
    )  # fmt: skip
    load.add_argument(
        "--requests-per-client", type=_whole(1, _MOST), default=1, metavar="N", help="of the closed loop, in a round"
    )
    load.add_argument(
        "--request-rate", dest="request_rates", type=_list_of(_positive), default=(), metavar="R,R,...",
        help="Poisson arrivals, so many a second on average; one row each",
    )  # fmt: skip
    load.add_argument(
        "--num-requests", type=_whole(1, _MOST), default=32, metavar="N", help="of a --request-rate, in a round"
    )
    load.add_argument(
        "--prefill", type=_whole(1, _MOST), nargs="?", const=1024, metavar="N",
        help="a row of prompts of N tokens (1024), one at a time, one output token each",
    )  # fmt: skip
    load.add_argument("--prompt-tokens", type=_whole(1, _MOST), default=128, metavar="N", help="random ids of a prompt")
    load.add_argument("--output-tokens", type=_whole(1, _MOST), default=64, metavar="N", help="of each request")
    load.add_argument("--prompts", type=Path, metavar="FILE", help="text prompts, one a line, instead of random ids")
    load.add_argument(
        "--shared-prefix", type=_whole(0, _MOST), default=0, metavar="N", help="ids in front of every random prompt"
    )
    load.add_argument(
        "--vocab-size", type=_whole(16, 1 << 30), metavar="N", help="if the model's files are not on this machine"
    )
    load.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, help="streams have TTFT and ITL figures"
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--rounds", type=_whole(1, 1000), default=3, metavar="N", help="of each row; medians count")
    measuring.add_argument("--warmup", type=_whole(0, 1000), default=1, metavar="N", help="rounds that do not count")
    measuring.add_argument("--seed", type=_whole(0, (1 << 63) - 1), default=0, metavar="N", help="of ids and arrivals")
    measuring.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="seconds a request may take")
    measuring.add_argument(
        "--roofline", action="store_true", help="measure this machine, and say what part of it was reached"
    )
    measuring.add_argument(
        "--against-transformers", action="store_true", help="the same work through transformers, in turn"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw the table (needs the extra `bench`)")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr, not even for a person")
    return parser


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parsed(word: str) -> int:
        allowed = f"{word!r}: must be a whole number from {least} to {most}"
        try:
            value = token_count(word)
        except ValueError:
            raise argparse.ArgumentTypeError(allowed) from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(allowed)
        return value

    return parsed


def _positive(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r}: must be a number above 0")
    return value


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parsed(word: str) -> tuple[Any, ...]:
        return tuple(parse(piece.strip()) for piece in word.split(","))

    return parsed


def _url(word: str) -> str:
    try:
        return parse_url(word).url
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
