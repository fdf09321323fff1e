"""Fill a model's weights from a checkpoint, or with random numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoints.architectures import about, canonical_name
from engine.checkpoints.errors import CheckpointError, makes_sense
from engine.checkpoints.expert_layout import as_stored
from engine.checkpoints.gguf_reader import GgufReader
from engine.checkpoints.mapped_file import MappedFile
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.plain_file import PlainFile, WeightFile
from engine.checkpoints.safetensors_reader import SafetensorsReader
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place, WeightReader, row_ranges
from engine.config import ModelSource

_SHOWN = 8
# Half the width of the uniform distribution of random weights: a standard deviation of 0.02, as models start with.
_RANDOM_BOUND = 0.02 * 3**0.5


def open_weights(
    source: ModelSource, config: ModelConfig, task: Task | None = None, *, mapped: bool = True
) -> WeightReader:
    """Open a checkpoint's weights under the names that the model of `config` knows them by; no tensor is read yet.

    task: with it, also the weights of the dense modules behind the model. mapped: read through mapped pages, which is
    quickest; else by calls, which raise where a file has been cut short (see `PlainFile`). Raises CheckpointError.
    """
    with makes_sense(source.path):
        return _open(source, config, task, MappedFile if mapped else PlainFile)


def _open(
    source: ModelSource, config: ModelConfig, task: Task | None, open_file: Callable[[Path], WeightFile]
) -> WeightReader:
    if source.kind == "gguf":
        return GgufReader(Path(source.path), config, open_file)
    folder = Path(source.path)
    main = SafetensorsReader(folder, open_file)
    prefix = about(config.architecture).prefix
    bare = is_bare(main.shapes(), prefix)
    found = {canonical_name(name, prefix, bare=bare): (main, name) for name in main.shapes()}
    for module in task.dense if task is not None else ():
        reader = SafetensorsReader(folder / module.path, open_file)
        found |= {f"{module.path}.{name}": (reader, name) for name in reader.shapes()}
    return RenamedReader(found)


def is_bare(names: Iterable[str], prefix: str) -> bool:
    """Whether a checkpoint was saved from the base model alone, so that its names lack the base model's prefix."""
    return not any(name.startswith(prefix) for name in names)


@dataclass(frozen=True)
class RenamedReader:
    """Tensors of several readers under other names: name → where it lies under which name."""

    tensors: Mapping[str, tuple[WeightReader, str]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {id(reader): reader.shapes() for reader, _ in self.tensors.values()}
        return {name: shapes[id(reader)][own] for name, (reader, own) in self.tensors.items()}

    def pieces(self, name: str, span: tuple[int, int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        reader, own = self.tensors[name]
        return reader.pieces(own, span)


def load_weights(
    reader: WeightReader,
    places: Mapping[str, Place],
    *,
    ignore: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
    threads: int = 2,
) -> None:
    """Copy every tensor of a checkpoint into its place.

    places: Hugging Face name → destination; experts may be stored in any layout (`expert_layout`). ignore: regular
    expressions (`re.search`) of names that the checkpoint may hold beyond these. progress: called in this thread with
    (bytes filled, bytes in all) at the start and after each tensor. threads: tensors that are read at once.

    Raises CheckpointError, before anything is copied, when tensors are missing, extra or misshapen, and names them.
    """
    check_fit(reader, places, ignore)
    copy_weights(reader, places, progress=progress, threads=threads)


def copy_weights(
    reader: WeightReader,
    places: Mapping[str, Place],
    *,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 2,
) -> None:
    """The second half of `load_weights`, for a checkpoint that `check_fit` has passed.

    Raises CheckpointError for what cannot be read; some of the places are filled then, and some are not.
    """
    shapes = reader.shapes()
    places = as_stored(places, shapes)
    total = sum(place.nbytes for place in places.values())
    done = 0
    if progress is not None:
        progress(done, total)
    # Each tensor is worked on by one thread: torch's own threads, which wait for one another after each of these small
    # steps, made a load of half a second take twelve on a busy machine.
    threads_before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, "weights", initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {executor.submit(_copy, reader, name, places[name]): name for name in shapes if name in places}
        for future in as_completed(futures):
            future.result()
            done += places[futures[future]].nbytes
            if progress is not None:
                progress(done, total)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)


def _copy(reader: WeightReader, name: str, place: Place) -> None:
    for start, rows in reader.pieces(name, place.span):
        place.write(start, rows)


def check_fit(reader: WeightReader, places: Mapping[str, Place], ignore: Iterable[str] = ()) -> None:
    """Raise CheckpointError, which names the tensors, unless `reader` has each place's tensor in its shape, and no
    others but those that `ignore` matches. No tensor is read."""
    shapes = reader.shapes()
    places = as_stored(places, shapes)
    patterns = [re.compile(pattern) for pattern in ignore]
    extra = [name for name in shapes if name not in places and not any(p.search(name) for p in patterns)]
    missing = [name for name in places if name not in shapes]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(place.shape)}"
        for name, place in places.items()
        if name in shapes and shapes[name] != place.shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit its config; tensors that are {'; '.join(problems)}")


def check_readable(reader: WeightReader, places: Mapping[str, Place]) -> None:
    """Raise CheckpointError for a tensor of a type that is not read, by reading the first piece of each."""
    for name in as_stored(places, reader.shapes()):
        next(reader.pieces(name), None)


def random_weights(places: Mapping[str, Place], seed: int, beat: Callable[[], None] = lambda: None) -> None:
    """Fill a model with random weights that depend on the seed and each tensor's name and shape alone.

    Uniform around 0 with a standard deviation of 0.02; the weights of norms are 1. beat: called again and again.
    """
    for name, place in places.items():
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        for start, stop in row_ranges(place.shape):
            beat()
            rows = torch.empty((stop - start, *place.shape[1:]), dtype=torch.float32)
            if name.lower().endswith("norm.weight"):
                rows.fill_(1.0)
            else:
                # One draw an element, in the order of the elements: how they are cut into pieces makes no difference.
                rows.uniform_(-_RANDOM_BOUND, _RANDOM_BOUND, generator=generator)
            place.write(start, rows)
