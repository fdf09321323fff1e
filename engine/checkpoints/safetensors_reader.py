"""Weights in safetensors files: one, or several with an index."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.mapped_file import MappedFile, as_floats
from engine.checkpoints.plain_file import WeightFile
from engine.checkpoints.safetensors_index import read_index
from engine.checkpoints.weights import overlap, row_ranges

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Tensor:
    file: WeightFile
    where: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SafetensorsReader:
    """A WeightReader over the safetensors files of a Hugging Face folder."""

    def __init__(self, folder: Path, open_file: Callable[[Path], WeightFile] = MappedFile) -> None:
        """Open the files; no tensor is read. Raises CheckpointError for files that are missing or damaged."""
        self._open_file = open_file
        self._tensors: dict[str, _Tensor] = {}
        index_path = folder / "model.safetensors.index.json"
        if index_path.is_file():
            self._open_indexed(folder, index_path)
        else:
            for path in _files(folder):
                for name, tensor in _tensors_in(path, open_file).items():
                    if name in self._tensors:
                        raise CheckpointError(f"{path}: holds {name}, which {self._tensors[name].where} holds too")
                    self._tensors[name] = tensor

    def _open_indexed(self, folder: Path, index_path: Path) -> None:
        index = read_index(index_path)
        files = {file: folder / file for file in sorted(set(index.values()))}
        missing = [file for file, path in files.items() if not path.is_file()]
        if missing:
            raise CheckpointError(f"{index_path}: names {len(missing)} missing files: {', '.join(missing[:8])}")
        tensors = {file: _tensors_in(path, self._open_file) for file, path in files.items()}
        for name, file in index.items():
            if name not in tensors[file]:
                raise CheckpointError(f"{index_path}: {name} should be in {file} but is not")
            self._tensors[name] = tensors[file][name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def pieces(self, name: str, span: tuple[int, int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        tensor = self._tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{tensor.where}: {name} is of type {tensor.dtype}; known are {', '.join(_DTYPES)}")
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        for start, stop in row_ranges(tensor.shape):
            if not overlap(start, stop, span):
                continue
            offset, size = tensor.offset + start * row_bytes, (stop - start) * row_bytes
            rows = as_floats(tensor.file.bytes_at(offset, size), dtype)
            yield start, rows.view(stop - start, *tensor.shape[1:])
            tensor.file.forget(offset, size)
        tensor.file.forget(tensor.offset, tensor.size)


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


def _tensors_in(path: Path, open_file: Callable[[Path], WeightFile]) -> dict[str, _Tensor]:
    """Where the tensors of a file lie, in the order of the file. The library checks the header; we only read it."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    opened = open_file(path)
    tensors = {}
    for name, entry in sorted(
        ((name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    ):
        begin, end = entry["data_offsets"]
        tensors[name] = _Tensor(
            file=opened,
            where=str(path),
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + begin,
            size=end - begin,
        )
    return tensors
