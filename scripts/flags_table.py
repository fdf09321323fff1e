"""Print docs/flags.md: every flag of `tokenmill serve`, from the same tables as the parser.

python -m scripts.flags_table > docs/flags.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from engine.config.fields import ConfigField, config_fields
from engine.config.ignored import IGNORED_FLAGS, NOT_YET_FLAGS, REFUSED_PREFIXES

_INTRODUCTION = """\
# Flags of `tokenmill serve`

Written by `python -m scripts.flags_table`; change `engine/config/server.py` or `engine/config/ignored.py` instead.

`--flag value` and `--flag=value` are the same, and a flag may be shortened as long as it stays unambiguous. A model
may also be named without `--model-path`: `tokenmill serve MODEL`. `--config FILE` reads a YAML map of flags (with
dashes or underscores) to values, over which the command line wins. Counts of tokens take the suffixes `k`, `M`, `G`
(powers of 1000) and `Ki`, `Mi`, `Gi` (powers of 1024). A flag that is not on this page ends the command with exit
code 2.
"""


def flags_document() -> str:
    """The whole of docs/flags.md."""
    return "\n".join([_INTRODUCTION, *_settings(), "", *_ignored(), "", *_refused(), ""])


def _settings() -> Iterator[str]:
    yield "| Flag | Value | Default | Meaning |"
    yield "|---|---|---|---|"
    for field in config_fields():
        names = ", ".join(f"`{name}`" for name in field.names)
        yield f"| {names} | {_value(field)} | {_default(field)} | {field.options.help.replace('|', chr(92) + '|')} |"


def _value(field: ConfigField) -> str:
    options = field.options
    if options.choices is not None:
        return ", ".join(f"`{choice}`" for choice in options.choices)
    if options.minimum is not None:
        return f"at least {options.minimum}" + ("" if options.maximum is None else f", at most {options.maximum}")
    words = {
        "switch": "", "int": "integer", "float": "number", "str": "word", "strs": "words", "json": "JSON object",
    }  # fmt: skip
    return words[field.kind]


def _default(field: ConfigField) -> str:
    if field.kind == "switch":
        return "off"
    if field.default is None or field.default in ([], {}):
        return "not set"
    return f"`{json.dumps(field.default) if field.kind == 'json' or field.default == '' else field.default}`"


def _ignored() -> Iterator[str]:
    yield "## Accepted without effect\n"
    yield "Launch scripts written for SGLang may hold these. Each is checked for its type, and a warning is logged.\n"
    yield ", ".join(f"`{name}`" for _, name in IGNORED_FLAGS)


def _refused() -> Iterator[str]:
    yield "## Refused\n"
    yield "What these ask for is not built, and the command says so instead of starting without it.\n"
    yield "| Flag | Feature |"
    yield "|---|---|"
    for _, name, feature in NOT_YET_FLAGS:
        yield f"| `{name}` | {feature} |"
    for prefix, feature in REFUSED_PREFIXES:
        yield f"| `{prefix}*` | {feature} |"


if __name__ == "__main__":
    print(flags_document(), end="")
