"""The command `tokenmill`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

import engine

# What a command needs is imported when it runs: `--help` and a mistyped flag answer at once.


def serve(words: Sequence[str]) -> int:
    """Serve a language model over HTTP."""
    from engine.config.command_line import parse_serve, shown_command

    command = parse_serve(words)
    from engine.launcher.serve import serve as launch

    return launch(command.config, shlex.join(shown_command(["tokenmill", "serve", *words])), command.warnings)


def bench(words: Sequence[str]) -> int:
    """Measure a server."""
    from engine.bench.options import parse_bench

    options = parse_bench(words)
    from engine.bench.run import bench as measure

    return measure(options)


def experts(words: Sequence[str]) -> int:
    """Draw which experts were chosen."""
    from engine.bench.expert_map import plot_experts

    return plot_experts(words)


def doctor(words: Sequence[str]) -> int:
    """Check whether this machine can serve."""
    from engine.doctor.run import doctor as examine

    return examine(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "bench": bench,
    "experts": experts,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of COMMANDS; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="tokenmill",
        epilog="tokenmill COMMAND --help lists the flags of a command",
        description="; ".join(f"{name}: {command.__doc__}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"tokenmill {engine.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    chosen: str = parser.parse_args(words[:1]).command
    return COMMANDS[chosen](words[1:])
