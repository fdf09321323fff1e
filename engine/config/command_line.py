"""The command line of `tokenmill serve`, generated from `ServerConfig` and the table of ignored flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.config.checks import check_config
from engine.config.fields import config_fields
from engine.config.flags import json_object
from engine.config.ignored import IGNORED_FLAGS, NOT_YET_FLAGS, REFUSED_PREFIXES, WHY_IGNORED
from engine.config.server import ConfigError, ServerConfig
from engine.config.settings_file import read_settings_file

SECRET_FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")


@dataclass(frozen=True)
class ParsedCommand:
    """A command line that can be served; `warnings`: one line for each setting that has no effect."""

    config: ServerConfig
    warnings: list[str]


def parse_serve(argv: Sequence[str]) -> ParsedCommand:
    """Parse the words behind `tokenmill serve`.

    `--flag value`, `--flag=value` and unambiguous prefixes of flags are understood. `--config FILE` names a YAML map
    of flags to values, over which the command line wins. A word that cannot be served ends the process with exit
    code 2 and a message on stderr, as argparse does.
    """
    parser = build_parser()
    typed = _parse(parser, list(argv))
    if "model" in typed:
        if "model_path" in typed:
            parser.error(f"the model is named twice: {typed['model']!r} and --model-path {typed['model_path']!r}")
        typed["model_path"] = typed.pop("model")
    try:
        filed = _parse(parser, read_settings_file(typed.pop("config"), parser)) if "config" in typed else {}
        given = filed | typed
        names = {field.name for field in config_fields()}
        config = ServerConfig(**{name: value for name, value in given.items() if name in names})
        warnings = [_ignored(flag) for _, flag in IGNORED_FLAGS if flag in given]
        return ParsedCommand(config, warnings + check_config(config))
    except ConfigError as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every known flag. What is not given is missing from its namespace: defaults are ServerConfig's."""
    parser = BriefParser(
        prog="tokenmill serve",
        usage="%(prog)s [MODEL] [--flag value ...]",
        description="Serve a language model over HTTP.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the same as --model-path")
    parser.add_argument("--config", metavar="FILE", help="YAML map of flags to values; the command line wins over it")
    for field in config_fields():
        unset = field.default is None or field.default is False or field.default in ("", [], {})
        default = "" if unset else f" (default: {field.default})"
        choices = "{" + ",".join(field.options.choices) + "}" if field.options.choices else None
        parser.add_argument(
            *field.names,
            dest=field.name,
            help=(field.options.help + default).replace("%", "%%"),
            **_takes(field.kind, field.options.parse, field.options.metavar or choices),
        )
    for kind, name in IGNORED_FLAGS:
        parser.add_argument(name, dest=name, help=argparse.SUPPRESS, **_takes(kind))
    for kind, name, _ in NOT_YET_FLAGS:
        parser.add_argument(name, dest=name, help=argparse.SUPPRESS, **_takes(kind))
    return parser


def shown_command(argv: Sequence[str]) -> list[str]:
    """A command line as typed, with the secrets in it replaced by `***`, so that it can be shown."""
    words: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        words.append("***" if hide_next else f"{name}=***" if equals and _is_secret(name) else word)
        hide_next = not hide_next and not equals and _is_secret(name)
    return words


def _ignored(flag: str) -> str:
    reason = WHY_IGNORED.get(flag)
    return f"{flag} has no effect in Tokenmill" + (f": {reason}" if reason else "")


def _is_secret(name: str) -> bool:
    """Whether `name` is a secret's flag, or a prefix of one that can mean nothing else."""
    public = {"--ssl-keyfile"}
    return len(name) > 3 and name not in public and any(secret.startswith(name) for secret in SECRET_FLAGS)


class BriefParser(argparse.ArgumentParser):
    """An ArgumentParser whose error message does not repeat a hundred flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """What the words set, by field name (for flags that are no field, by flag). Exits with 2 on a refused flag."""
    for word in words:
        for prefix, feature in REFUSED_PREFIXES:
            if word.startswith(prefix):
                parser.error(f"argument {word.partition('=')[0]}: {feature} is not supported")
    given = vars(parser.parse_args(words))
    for _, name, feature in NOT_YET_FLAGS:
        if name in given:
            parser.error(f"argument {name}: {feature}: not built yet")
    return given


def _takes(kind: str, parse: Callable[[str], Any] | None = None, metavar: str | None = None) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a flag of this kind."""
    if kind == "switch":
        return {"action": "store_true"}
    by_kind: dict[str, Callable[[str], Any]] = {"int": int, "ints": int, "float": float, "json": json_object}
    word_type = by_kind.get(kind, str)
    arguments: dict[str, Any] = {"type": _reporting(parse or word_type, kind), "metavar": metavar or kind.upper()}
    return arguments | ({"nargs": "*"} if kind == "strs" else {"nargs": "+"} if kind == "ints" else {})


def _reporting(parse: Callable[[str], Any], kind: str) -> Callable[[str], Any]:
    """`parse`, with its ValueError in the form whose message argparse shows."""

    def parsed(word: str) -> Any:
        try:
            return parse(word)
        except ValueError as error:
            known = parse in (int, float)
            raise argparse.ArgumentTypeError(f"{word!r} is not of type {kind}" if known else str(error)) from None

    return parsed
