"""The Hugging Face hub: what of a repository is in the local cache, and downloading what is not.

huggingface_hub is imported only when a hub id is really looked up: it costs half a second.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable
from pathlib import Path

from engine.checkpoints.errors import Lack
from engine.checkpoints.gguf_split import first_files, part_names

logger = logging.getLogger(__name__)

# Seconds that the hub may take to answer one request about a repository (not to send its files).
HUB_TIMEOUT = 10.0

_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")
_TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_WEIGHTS = "*.safetensors"
# The parts of a sentence-transformers model lie in folders of their own, named by modules.json.
_PARTS = ("[0-9]*_*/config.json", "[0-9]*_*/*.safetensors")


class DownloadError(Exception):
    """Why a repository could not be downloaded; the caller puts the rest of the story around it.

    lack: what the hub has not; None where it has the repository, or might have.
    unreachable: nobody could be asked.
    """

    def __init__(self, message: str, lack: Lack | None = None, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.lack = lack
        self.unreachable = unreachable


def is_repository_name(name: str) -> bool:
    """Whether `name` may be `name`, `owner/name` or `owner/name/file.gguf`, and is not plainly meant as a path."""
    if _NAME.fullmatch(name) is None or name.startswith("."):
        return False
    parts = name.split("/")
    return (parts[-1].endswith(".gguf")) == (len(parts) == 3)


def split_name(name: str) -> tuple[str, str | None]:
    """`owner/name/file.gguf` → (`owner/name`, `file.gguf`); any other name → (name, None)."""
    if name.count("/") == 2:
        repository, _, file_name = name.rpartition("/")
        return repository, file_name
    return name, None


def cache_place(download_dir: str | None) -> str:
    """The folder of the hub cache, for messages."""
    from huggingface_hub import constants

    return download_dir or str(constants.HF_HUB_CACHE)


def cached_folder(repository: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The cached snapshot of a repository, which may be a partial one; None: nothing is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # The pattern keeps huggingface_hub from insisting on every file of the repository, README and all.
        folder = snapshot_download(
            repository, revision=revision, cache_dir=download_dir, local_files_only=True, allow_patterns=["config.json"]
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(folder)


def download(
    repository: str,
    file_name: str | None,
    wanted: Callable[[str, list[str], str | None], list[str]],
    revision: str | None,
    download_dir: str | None,
) -> Path:
    """Download the files that `wanted` picks from the list of a repository's files; the snapshot's folder.

    Files that are cached already are not fetched again. Raises DownloadError.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = False
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT)
        asked = True
        files = wanted(repository, [sibling.rfilename for sibling in info.siblings or []], file_name)
        logger.info("downloading %d files of %s from the hub", len(files), repository)
        paths = [
            hf_hub_download(repository, file, revision=info.sha, cache_dir=download_dir, etag_timeout=HUB_TIMEOUT)
            for file in files
        ]
        _remember_revision(Path(paths[0]).parent, revision or "main", info.sha)
    except OfflineModeIsEnabled:
        raise DownloadError("downloads are switched off (HF_HUB_OFFLINE)", unreachable=True) from None
    except HFValidationError:
        raise DownloadError(
            f"{repository!r} is not a hub id (invalid repository id)", "invalid repository id"
        ) from None
    except GatedRepoError:
        raise DownloadError("its owner grants access on request only; log in (HF_TOKEN)") from None
    except RepositoryNotFoundError:
        raise DownloadError(
            "the hub does not have it, or not for you (repository not found)", "repository not found"
        ) from None
    except RevisionNotFoundError:
        raise DownloadError(f"it has no revision {revision!r} (revision not found)", "revision not found") from None
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise DownloadError(
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}",
            unreachable=not asked,
        ) from error
    return Path(paths[0]).parent


def _remember_revision(snapshot: Path, revision: str, commit: str | None) -> None:
    """Note in the cache which commit `revision` is, so that it is found offline.

    hf_hub_download does that only when it is asked for the revision's name; we ask for the commit, lest the branch
    moves between two files.
    """
    ref = snapshot.parent.parent / "refs" / revision
    if commit is not None and commit != revision:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def model_files(repository: str, files: list[str], file_name: str | None) -> list[str]:
    """The files of a repository that serving it takes: configs, tokenizer, and safetensors or else one .gguf model."""
    top = [file for file in files if "/" not in file]
    texts = _matching(top, _TEXT_FILES)
    if "modules.json" in top:
        texts += _matching(files, _PARTS)
    weights = _matching(top, (_WEIGHTS,))
    # The original weights of Mistral's repositories lie beside the converted ones, under this name.
    converted = [file for file in weights if not file.startswith("consolidated")]
    if file_name is None and "config.json" in top and weights:
        return texts + (converted or weights)
    return texts + _gguf_files(repository, top, file_name, "config.json with *.safetensors")


def tokenizer_files(repository: str, files: list[str], file_name: str | None) -> list[str]:
    """The files of a repository that its tokenizer takes; a .gguf file only when there are no others."""
    top = [file for file in files if "/" not in file]
    texts = _matching(top, _TEXT_FILES)
    if file_name is None and any(file.startswith(("tokenizer", "vocab", "tekken")) for file in texts):
        return texts
    return texts + _gguf_files(repository, top, file_name, "tokenizer.json")


def _gguf_files(repository: str, files: list[str], file_name: str | None, missing: str) -> list[str]:
    models = first_files(_matching(files, ("*.gguf",)))
    if file_name is not None:
        if file_name not in files:
            raise DownloadError(
                f"{repository} has no file {file_name}; its .gguf models: {', '.join(models) or 'none'}"
            )
        models = [file_name]
    if not models:
        raise DownloadError(f"{repository} holds neither {missing} nor a .gguf file")
    if len(models) > 1:
        raise DownloadError(
            f"{repository} holds {len(models)} .gguf models; name one as {repository}/{models[0]}: {', '.join(models)}"
        )
    return part_names(models[0])


def _matching(files: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)]
