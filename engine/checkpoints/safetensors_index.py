"""The index of a checkpoint that is split over several safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from engine.checkpoints.errors import CheckpointError


def read_index(path: Path) -> dict[str, str]:
    """Read `model.safetensors.index.json`: tensor name → name of the file beside it that holds the tensor.

    Raises CheckpointError when it is not such an index.
    """
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: weight_map[{name!r}] is {file!r}, not the name of a file beside it")
    return weight_map
