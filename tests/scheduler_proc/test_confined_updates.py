"""--allowed-weights-root: which checkpoints an update may name."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny_models import tiny_llama
from updates import served


def test_updates_come_from_below_the_allowed_roots_only(tmp_path: Path) -> None:
    launched = tiny_llama(tmp_path / "launched")
    root = tmp_path / "root"
    inside = shutil.copytree(launched, root / "inside")
    outside = shutil.copytree(launched, tmp_path / "outside")
    (root / "link").symlink_to(outside)
    linked = shutil.copytree(launched, root / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")

    server = served(launched, allowed_weights_root=[str(root)])
    for path in (outside, root / "link", linked, f"{root}/../outside", "/nowhere/at-all", "owner/name"):
        assert server.refused(path) == (
            f"Failed to get weights iterator: {path} does not lie below --allowed-weights-root ({root})."
        )
    for path in (inside, launched):
        server.update(path)
        server.pump()
        assert server.answer().success, server.answer().message
