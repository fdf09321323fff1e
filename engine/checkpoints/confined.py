"""Which checkpoints a request may name: those below --allowed-weights-root."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.checkpoints import hub
from engine.checkpoints.errors import CheckpointError


def check_named(name: str, roots: Sequence[str], download_dir: str | None) -> None:
    """Raise CheckpointError unless what `name` stands for lies below one of `roots`. Nothing of it is opened.

    A path has to lie there once all symbolic links are followed. A hub id is good for what of it is cached there; it is
    never downloaded.
    """
    path = Path(name).expanduser()
    if hub.is_repository_name(name) and not path.exists():
        cached = hub.cached_folder(hub.split_name(name)[0], None, download_dir)
        if cached is None:
            raise _outside(name, roots)
        path = cached
    _check(name, [path], roots)


def check_files(name: str, folder: Path, roots: Sequence[str]) -> None:
    """Raise CheckpointError unless the files of the checkpoint `name` lie below one of `roots`, where links lead to."""
    _check(name, [folder, *folder.iterdir(), *folder.glob("[0-9]*_*/*")] if folder.is_dir() else [folder], roots)


def _check(name: str, paths: Iterable[Path], roots: Sequence[str]) -> None:
    resolved = [Path(root).expanduser().resolve() for root in roots]
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in resolved):
            raise _outside(name, roots)


def _outside(name: str, roots: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"{name} does not lie below --allowed-weights-root ({', '.join(roots)})")
