"""Fill a model's weights from a checkpoint, or with random numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.expert_layout import as_stored
from engine.checkpoints.gguf_reader import GgufReader
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.safetensors_reader import SafetensorsReader
from engine.checkpoints.weights import Place, WeightReader, row_ranges
from engine.config import ModelSource

_SHOWN = 8
# Half the width of the uniform distribution of random weights: a standard deviation of 0.02, as models start with.
_RANDOM_BOUND = 0.02 * 3**0.5


def open_weights(source: ModelSource, config: ModelConfig) -> WeightReader:
    """Open a checkpoint's weights; no tensor is read yet. Raises CheckpointError."""
    if source.kind == "gguf":
        return GgufReader(Path(source.path), config)
    return SafetensorsReader(Path(source.path))


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
    shapes = reader.shapes()
    places = as_stored(places, shapes)
    _check_fit(shapes, places, ignore)
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
    for start, rows in reader.pieces(name):
        place.write(start, rows)


def _check_fit(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], ignore: Iterable[str]) -> None:
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


def random_weights(places: Mapping[str, Place], seed: int) -> None:
    """Fill a model with random weights that depend on the seed and each tensor's name and shape alone.

    Uniform around 0 with a standard deviation of 0.02; the weights of norms are 1.
    """
    for name, place in places.items():
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        for start, stop in row_ranges(place.shape):
            rows = torch.empty((stop - start, *place.shape[1:]), dtype=torch.float32)
            if name.endswith("norm.weight"):
                rows.fill_(1.0)
            else:
                # One draw an element, in the order of the elements: how they are cut into pieces makes no difference.
                rows.uniform_(-_RANDOM_BOUND, _RANDOM_BOUND, generator=generator)
            place.write(start, rows)
