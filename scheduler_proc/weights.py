"""The weights that serve: where they came from, whether another checkpoint could take their place, and how it does.

Whether it could is found out beforehand, without touching what serves: the same computation, the same tensors, all of
them readable. Only then are tensors overwritten, one by one in place. Should that fail all the same, the checkpoint
that served before is read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.checkpoints.confined import check_files, check_named
from engine.checkpoints.errors import CheckpointError, NotFoundError
from engine.checkpoints.load_weights import check_fit, check_readable, copy_weights, open_weights, random_weights
from engine.checkpoints.locate import is_bundled, locate
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.plain_file import PlainFile
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import read_task
from engine.checkpoints.weight_files import FileStamp, file_stamps
from engine.checkpoints.weights import Place, WeightReader
from engine.config import ModelSource, RunConfig
from engine.kernels.host_memory import available_memory
from engine.models.model import Model
from engine.parallel.group import GroupLostError
from engine.wire.to_worker import HeldPart
from scheduler_proc.ranks import Ranks
from scheduler_proc.same_model import config_differences, task_differences

logger = logging.getLogger(__name__)

FORMATS = ("auto", "safetensors", "gguf")
READ_AHEAD = 4 << 20
"""Bytes that are read at once to have a checkpoint in the system's cache."""
READ_AHEAD_SHARE = 0.5
"""A checkpoint larger than this share of the free memory is not read ahead: its start would be gone before its end."""


class RefusedUpdateError(Exception):
    """An update that did not take place, in the words that its client gets; what served before serves."""


class WeightsLostError(RuntimeError):
    """The weights are neither the old ones nor the new: nothing may be computed with them."""


@dataclass(frozen=True)
class Checkpoint:
    """source: where it lies. random: its tensors are not read but drawn (--load-format dummy).

    stamps: of its files when they were read.
    """

    source: ModelSource
    random: bool
    stamps: tuple[FileStamp, ...]


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that fits, opened."""

    checkpoint: Checkpoint
    reader: WeightReader


def launched_checkpoint(config: RunConfig) -> Checkpoint:
    """What the server starts with; to be called before its tensors are read."""
    random = config.server.load_format == "dummy"
    return Checkpoint(config.model, random, () if random else file_stamps(config.model))


@dataclass(slots=True)
class Weights:
    """model: whose places are filled from `serving`. launch: the configuration of the launch.
    moved: the checkpoint that serves, if it is not that of the launch. ranks: of a divided model, on rank 0; None: it
    is not divided, or this is another rank. before: what served before the last `replace` that has succeeded. beat:
    called while tensors are copied, as a sign of life.

    `prepare` may run while steps are computed, `replace` may not.
    """

    model: Model
    serving: Checkpoint
    launch: RunConfig
    seconds: dict[str, float] = field(default_factory=dict)
    moved: ModelSource | None = None
    ranks: Ranks | None = None
    before: Checkpoint | None = None
    beat: Callable[[], None] = lambda: None

    def prepare(self, model_path: str, load_format: str | None) -> Prepared:
        """Find a checkpoint, open it and make sure that it fits. Raises RefusedUpdateError."""
        try:
            return self._prepare(model_path, load_format)
        except RefusedUpdateError:
            raise
        except Exception as error:  # whatever is wrong with somebody's files must not end the server
            logger.exception("Unexpected: %s could not be opened", model_path)
            raise RefusedUpdateError(f"Failed to get weights iterator: {_clause(error)}.") from error

    def _prepare(self, model_path: str, load_format: str | None) -> Prepared:
        started = time.monotonic()
        wanted = self._format(load_format)
        try:
            source = self._locate(model_path)
            held = "gguf" if source.kind == "gguf" else "safetensors"
            if wanted not in ("auto", held):
                raise RefusedUpdateError(
                    f"Failed to get model loader: load_format is {wanted!r}, and {source.path} is read as {held}."
                )
            config = read_model_config(source, self.launch.server.json_model_override_args)
            checkpoint = Checkpoint(source, False, file_stamps(source))
            reader = open_weights(source, config, self.model.task, mapped=False)
        except NotFoundError as error:
            raise RefusedUpdateError(f"Failed to get weights iterator: {model_path} ({error.lack}).") from None
        except CheckpointError as error:
            raise RefusedUpdateError(f"Failed to get weights iterator: {_clause(error)}.") from None
        try:
            self._check(source, config, reader)
            _read_ahead(checkpoint.stamps)
        except CheckpointError as error:
            raise _misfit(error) from None
        self.seconds["check"] = time.monotonic() - started
        return Prepared(checkpoint, reader)

    def opened(self, source: ModelSource) -> Prepared:
        """A checkpoint that another rank has prepared. Raises RefusedUpdateError."""
        self.before = None
        try:
            config = read_model_config(source, self.launch.server.json_model_override_args)
            checkpoint = Checkpoint(source, False, file_stamps(source))
            reader = open_weights(source, config, self.model.task, mapped=False)
            check_fit(reader, self.model.places, self.model.ignored)
            return Prepared(checkpoint, reader)
        except Exception as error:
            logger.exception("%s could not be opened", source.path)
            raise _misfit(error) from error

    def replace(self, prepared: Prepared) -> None:
        """Overwrite the weights, on all ranks.

        Raises RefusedUpdateError when that has failed and the old weights are in force again, WeightsLostError when not
        even these can be had.
        """
        if self.ranks is None:
            self._replace(prepared)
            return
        refusal: RefusedUpdateError | None = None
        try:
            answers = self.ranks.replace(prepared.checkpoint.source, lambda: self._replace(prepared))
            told = next((answer.refusal for answer in answers if answer.refusal is not None), None)
            if told is None:
                return
            refusal = RefusedUpdateError(told)
            self.revert(refusal)
        except RefusedUpdateError as error:
            refusal = error
        self.ranks.revert(str(refusal))
        raise refusal

    def revert(self, failure: Exception) -> None:
        """Take the weights back that served before the last `replace`; nothing, where that has failed here itself.
        failure: why. Raises WeightsLostError."""
        if self.before is not None:
            self.serving, self.before = self.before, None
            self._restore(failure)

    def _replace(self, prepared: Prepared) -> None:
        self.before = None
        started = time.monotonic()
        try:
            copy_weights(prepared.reader, self.model.places, progress=self._beat)
            if file_stamps(prepared.checkpoint.source) != prepared.checkpoint.stamps:
                raise CheckpointError(f"{prepared.checkpoint.source.path} was changed while it was read")
        except GroupLostError:
            raise
        except Exception as error:
            logger.exception("The weights of %s could not be copied", prepared.checkpoint.source.name)
            self._restore(error)
            raise _misfit(error) from error
        self.before, self.serving = self.serving, prepared.checkpoint
        self.seconds["copy"] = time.monotonic() - started
        logger.info(
            "Weights replaced by those of %s: %.2f s to check them, %.2f s to copy them",
            self.serving.source.name, self.seconds.get("check", 0.0), self.seconds["copy"],
        )  # fmt: skip

    def rows(self, name: str, count: int) -> list[Any] | None:
        """The first `count` rows of a tensor under its Hugging Face name, as numbers; None: there is none."""
        place = self._place(name)
        if place is None:
            return None
        if self.ranks is None:
            found = place.read(count).to(torch.float32)
        else:
            width = place.shape[1] if len(place.shape) > 1 else None
            found = self.ranks.whole_rows(name, count, self.held_part(name, count, 0), width)
        values: list[Any] = found.tolist()
        return values

    def held_part(self, name: str, count: int, rank: int) -> HeldPart:
        """What this rank holds of the first `count` rows of a tensor, which the model must have."""
        place = self._place(name)
        assert place is not None, name
        rows = place.read(count).to("cpu", torch.float32).contiguous()
        return HeldPart(rank, place.span[0], list(rows.shape), rows.numpy().tobytes())

    def _place(self, name: str) -> Place | None:
        if name == "lm_head.weight" and self.model.config.tie_embeddings:
            name = "model.embed_tokens.weight"
        return self.model.places.get(name)

    def _format(self, load_format: str | None) -> str:
        """The format to be read; a server of random weights has none that could be meant by naming none."""
        launched = self.launch.server.load_format
        wanted = load_format or ("auto" if launched == "dummy" else launched)
        if wanted not in FORMATS:
            raise RefusedUpdateError(
                f"Failed to get model loader: load_format is {wanted!r}; weights are updated from "
                f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
            )
        return wanted

    def _locate(self, model_path: str) -> ModelSource:
        """As at the launch; what was launched is known by its name, the bundled model also by its plain one."""
        if (known := self.launch.launched.get(model_path)) is not None:
            return msgspec.structs.replace(known, name=model_path)
        launched, server = self.launch.model, self.launch.server
        plain = server.served_model_name if is_bundled(launched) else None
        if model_path in (launched.name, plain):
            return msgspec.structs.replace(launched, name=model_path)
        if not model_path:
            raise NotFoundError("model_path is empty", "invalid repository id")
        roots = server.allowed_weights_root
        if not roots:
            return locate(model_path, download_dir=server.download_dir)
        check_named(model_path, roots, server.download_dir)
        source = locate(model_path, download_dir=server.download_dir)
        check_files(model_path, Path(source.path), roots)
        return source

    def _check(self, source: ModelSource, config: ModelConfig, reader: WeightReader) -> None:
        """Raise CheckpointError unless the model that serves computes as that of the checkpoint, tensor for tensor."""
        task = read_task(source, config, is_embedding=self.launch.server.is_embedding)
        different = config_differences(self.model.config, config) + task_differences(self.model.task, task)
        if different:
            raise CheckpointError(f"{source.path} is another model: {'; '.join(different)}")
        check_fit(reader, self.model.places, self.model.ignored)
        check_readable(reader, self.model.places)

    def _beat(self, done: int, total: int) -> None:
        self.beat()

    def _restore(self, failure: Exception) -> None:
        """Read the checkpoint that served before again. Raises WeightsLostError."""
        old = self.serving
        try:
            if old.random:
                random_weights(self.model.places, seed=self.launch.server.random_seed or 0, beat=self.beat)
                return
            if file_stamps(old.source) != old.stamps:
                raise CheckpointError(f"{old.source.path} is not what it was when it was loaded")
            config = read_model_config(old.source, self.launch.server.json_model_override_args)
            reader = open_weights(old.source, config, self.model.task, mapped=False)
            check_fit(reader, self.model.places, self.model.ignored)
            copy_weights(reader, self.model.places, progress=self._beat)
        except GroupLostError:
            raise
        except Exception as error:
            raise WeightsLostError(
                f"an update of the weights broke off ({failure}), and the old weights cannot be read again: {error}"
            ) from error


def _clause(error: Exception) -> str:
    """An error's message without the full stop that is put behind it."""
    return str(error).rstrip(". ") or type(error).__name__


def _misfit(error: Exception) -> RefusedUpdateError:
    return RefusedUpdateError(f"Failed to update weights: {_clause(error)}.\nRolling back to original weights.")


def _read_ahead(stamps: tuple[FileStamp, ...]) -> None:
    """Read files through once, so that copying them, for which all requests wait, need not wait for a disk.

    Raises CheckpointError for a file that cannot be read.
    """
    if sum(stamp.size for stamp in stamps) > READ_AHEAD_SHARE * available_memory():
        return
    for stamp in stamps:
        file = PlainFile(Path(stamp.path))
        for offset in range(0, stamp.size, READ_AHEAD):
            file.bytes_at(offset, min(READ_AHEAD, stamp.size - offset))
