"""Weights in safetensors files: one, or several with an index."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.mapped_file import MappedFile
from engine.checkpoints.safetensors_index import read_index

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements that are converted at once: temporaries of half a MB stay in the cache.
_CHUNK = 131072


@dataclass(frozen=True)
class _Place:
    file: MappedFile
    where: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SafetensorsReader:
    """A WeightReader over the safetensors files of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """Open the files; no tensor is read. Raises CheckpointError for files that are missing or damaged."""
        self._places: dict[str, _Place] = {}
        index_path = folder / "model.safetensors.index.json"
        if index_path.is_file():
            self._open_indexed(folder, index_path)
        else:
            for path in _files(folder):
                for name, place in _places_in(path).items():
                    if name in self._places:
                        raise CheckpointError(f"{path}: holds {name}, which {self._places[name].where} holds too")
                    self._places[name] = place

    def _open_indexed(self, folder: Path, index_path: Path) -> None:
        index = read_index(index_path)
        files = {file: folder / file for file in sorted(set(index.values()))}
        missing = [file for file, path in files.items() if not path.is_file()]
        if missing:
            raise CheckpointError(f"{index_path}: names {len(missing)} missing files: {', '.join(missing[:8])}")
        places = {file: _places_in(path) for file, path in files.items()}
        for name, file in index.items():
            if name not in places[file]:
                raise CheckpointError(f"{index_path}: {name} should be in {file} but is not")
            self._places[name] = places[file][name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise CheckpointError(f"{place.where}: {name} is of type {place.dtype}; known are {', '.join(_DTYPES)}")
        if tuple(destination.shape) != place.shape:
            raise CheckpointError(f"{place.where}: {name} is {place.shape}, its place {tuple(destination.shape)}")
        if place.size == 0:
            return
        data = place.file.bytes_at(place.offset, place.size)
        if place.offset % _DTYPES[place.dtype].itemsize:
            # Old writers did not align the data; rare enough to copy the tensor.
            data = data.clone()
        source = data.view(_DTYPES[place.dtype])
        if not place.shape:
            destination.copy_(source[0])
            return
        rows = source.view(place.shape[0], -1)
        target = destination if destination.dim() > 1 else destination.unsqueeze(1)
        step = max(1, _CHUNK // rows.shape[1])
        row_bytes = place.size // place.shape[0]
        for start in range(0, place.shape[0], step):
            piece = rows[start : start + step]
            target[start : start + step].copy_(piece.view(piece.shape[0], *target.shape[1:]))
            place.file.forget(place.offset + start * row_bytes, piece.shape[0] * row_bytes)
        place.file.forget(place.offset, place.size)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder without an index."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(folder.glob("*.safetensors"))
    # Beside the converted weights, Mistral's repositories have the original ones under this name.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors files (other formats of weights are not read)")
    return files


def _places_in(path: Path) -> dict[str, _Place]:
    """Where the tensors of a file lie, in the order of the file. The library checks the header; we only read it."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    mapped = MappedFile(path)
    places = {}
    for name, entry in sorted(
        ((name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    ):
        begin, end = entry["data_offsets"]
        places[name] = _Place(
            file=mapped,
            where=str(path),
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + begin,
            size=end - begin,
        )
    return places
