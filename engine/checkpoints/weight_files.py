"""Which files hold a checkpoint's weights, and whether they are still what they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_split import split_files
from engine.config import ModelSource


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is written to or replaced. size: bytes; modified: nanoseconds since 1970."""

    path: str
    size: int
    modified: int
    device: int
    inode: int


def file_stamps(source: ModelSource) -> tuple[FileStamp, ...]:
    """The stamps of all files from which a checkpoint's weights are read. Raises CheckpointError."""
    path = Path(source.path)
    if source.kind == "gguf":
        files = split_files(path)
    else:
        patterns = ("*.safetensors", "*.safetensors.index.json", "config.json", "[0-9]*_*/*.safetensors")
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
    try:
        return tuple(_stamp(file) for file in files)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _stamp(file: Path) -> FileStamp:
    status = file.stat()
    return FileStamp(str(file), status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)
