"""A hub cache that holds stand-ins: what a client of the hub finds under a repository's name is a folder of ours."""

from __future__ import annotations

from pathlib import Path

_COMMIT = "0" * 40


def add_repository(cache: Path, name: str, folder: Path) -> None:
    """Put `folder` into the hub cache `cache` (HF_HUB_CACHE) as the repository `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / _COMMIT).symlink_to(folder, target_is_directory=True)
