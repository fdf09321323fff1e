"""`--config FILE`: a YAML map of flags to values, turned into words of the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engine.config.server import ConfigError


def read_settings_file(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """The words that say what the file says: `port: 8000` becomes `--port=8000`.

    Keys are names of `parser`'s flags, with dashes or underscores; a switch takes true or false; null leaves a flag
    unset. Raises ConfigError, which names the file and the key.
    """
    import yaml  # only those who have such a file pay for its import

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"argument --config: {file!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"argument --config: {file!r} is not YAML: {error}") from None
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"argument --config: {file!r} is not a map of flags to values")
    flags = {name: action for action in parser._actions for name in action.option_strings}
    for name in ("-h", "--help", "--config"):
        flags.pop(name)
    words: list[str] = []
    for key, value in settings.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in flags:
            raise ConfigError(f"argument --config: {file!r} has the unknown key {key!r}")
        if value is not None:
            words += _words(flag, value, flags[flag], f"argument --config: {file!r}: {key}")
    return words


def _words(flag: str, value: Any, action: argparse.Action, where: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {value!r}: must be true or false")
        return [flag] if value else []
    if isinstance(value, bool):
        raise ConfigError(f"{where}: {value!r}: needs a value, not true or false")
    if isinstance(value, list):
        if action.nargs is None:
            raise ConfigError(f"{where}: {value!r}: must be one value, not a list")
        return [flag, *map(str, value)]
    word = json.dumps(value) if isinstance(value, dict) else str(value)
    return [flag, word] if action.nargs is not None else [f"{flag}={word}"]
