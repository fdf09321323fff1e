"""GGUF models that are split over several files: `name-00001-of-00003.gguf` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from engine.checkpoints.errors import CheckpointError

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_files(names: Iterable[str]) -> list[str]:
    """The models among the names of `.gguf` files, sorted: of a split model only its first file."""
    matches = ((name, _SPLIT_NAME.fullmatch(name)) for name in sorted(names))
    return [name for name, match in matches if match is None or int(match["number"]) == 1]


def part_names(name: str) -> list[str]:
    """The names of all files of the model whose first (or only) file has this name.

    Raises CheckpointError when it is the name of another part.
    """
    match = _SPLIT_NAME.fullmatch(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if number != 1 or count < 1:
        raise CheckpointError(f"{name} is part {number} of {count} of a model; name part 1")
    return [f"{match['stem']}-{part:05d}-of-{match['count']}.gguf" for part in range(1, count + 1)]


def split_files(path: Path) -> list[Path]:
    """All files of the model whose first (or only) file is `path`. Raises CheckpointError when one is missing."""
    files = [path.with_name(name) for name in part_names(path.name)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(files)} files are missing: {', '.join(missing[:8])}")
    return files
