"""Which experts the tokens of a model took (contract §8): recorded step by step while recording is on, written as CSV
files on demand."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.model_config import ModelConfig
from engine.config import ServerConfig
from engine.config.environment import setting
from engine.kernels.batch import RaggedBatch
from engine.kernels.table import Integers, Longs
from engine.wire.to_frontend import ExpertsRecorded
from engine.wire.to_scheduler import RecordExperts
from scheduler_proc.record_spool import Spool, SpooledStep

logger = logging.getLogger(__name__)

Mode = Literal["stat", "per_pass", "per_token"]
DEFAULT_PASSES = 1000
DEFAULT_FOLDER = "/tmp"
_HEADERS: dict[Mode, str] = {
    "stat": "layer_id,expert_id,count",
    "per_pass": "forward_pass_id,layer_id,expert_id,count",
    "per_token": "forward_pass_id,token_index,token_id,position,layer_id,expert_ids",
}


@dataclass(frozen=True)
class RecorderSettings:
    """layers: the model's numbers of its mixtures of experts, in order; experts: of each. passes: most that are kept,
    the last ones; None: all. folder: where files are written."""

    mode: Mode
    passes: int | None
    folder: Path
    layers: tuple[int, ...]
    experts: int


@dataclass(frozen=True, eq=False)
class CountedPass:
    """counts: how often each layer's experts were taken, int32 [layers, experts]."""

    number: int
    counts: Integers


@dataclass(frozen=True, eq=False)
class TokenPass:
    """A step's tokens [T], and the experts that they took in each layer, int32 [T, top_k], best first."""

    number: int
    token_ids: Longs
    positions: Longs
    routing: tuple[Integers, ...]


@dataclass(slots=True)
class Recorder:
    """number: of steps that were computed, recorded or not. spool: what outlives this process; None: nothing does."""

    settings: RecorderSettings
    on: bool = False
    number: int = 0
    spool: Spool | None = None
    kept: deque[CountedPass | TokenPass] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = deque(maxlen=self.settings.passes)

    def resume(self) -> None:
        """Go on where a scheduler before this one has died."""
        if self.spool is None:
            return
        self.kept.extend(_unpacked(self.settings, step) for step in self.spool.read())
        self.number = self.kept[-1].number if self.kept else 0
        self.on = self.spool.on
        if self.on or self.kept:
            logger.info("The record of experts goes on: %d steps are there, recording is %s", len(self.kept), self.on)

    def start(self) -> None:
        """Forget what was recorded, and record from the next step on."""
        if self.on:
            logger.warning("The expert distribution is being recorded already; the record is reset")
        self._forget()
        self._turn(True)

    def stop(self) -> None:
        """Record no more; what was recorded is kept."""
        if not self.on:
            logger.warning("The expert distribution is not being recorded; there is nothing to stop")
        self._turn(False)

    def step(self, batch: RaggedBatch, routing: Callable[[], list[Integers]]) -> None:
        """Take note of a step. routing: the program's, for this step; not asked while recording is off."""
        self.number += 1
        if not self.on:
            return
        found = routing()
        if len(found) != len(self.settings.layers):
            raise ValueError(f"{len(found)} layers have routed a step; expected {len(self.settings.layers)}")
        if self.settings.mode == "per_token":
            ids, positions = batch.token_ids.numpy().copy(), batch.positions.numpy().copy()
            self._keep(TokenPass(self.number, ids, positions, tuple(found)))
            return
        counts = np.zeros((len(found), self.settings.experts), np.int32)
        for layer, taken in enumerate(found):
            counts[layer] = np.bincount(taken.ravel(), minlength=self.settings.experts)
        self._keep(CountedPass(self.number, counts))

    def note(self, batch: RaggedBatch, routing: Callable[[], list[Integers]]) -> None:
        """As `step`, but a record that cannot go on ends; the requests do not."""
        try:
            self.step(batch, routing)
        except Exception:
            logger.exception("The expert distribution cannot be recorded any further; recording ends")
            self.stop()

    def dump(self, rank: int) -> Path:
        """Write what was recorded, and forget it. Returns the file, which appears under its name once it is whole.

        Raises OSError, and then forgets nothing.
        """
        folder = self.settings.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"expert_distribution_rank{rank}_timestamp{time.time()}.csv"
        unfinished = folder / f".{path.name}.{os.getpid()}"
        try:
            # For the user alone: with single tokens in it, the file tells what was asked.
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(_HEADERS[self.settings.mode] + "\n")
                file.writelines(_lines(self.settings, list(self.kept)))
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
        logger.info("Expert distribution of %d steps written to %s", len(self.kept), path)
        self._forget()
        return path

    def _turn(self, on: bool) -> None:
        self.on = on
        if self.spool is not None:
            self.spool.on = on

    def _keep(self, one: CountedPass | TokenPass) -> None:
        self.kept.append(one)
        if self.spool is not None:
            self.spool.append(_packed(one))

    def _forget(self) -> None:
        self.kept.clear()
        if self.spool is not None:
            self.spool.clear()


def _packed(one: CountedPass | TokenPass) -> SpooledStep:
    columns: list[NDArray[np.integer]]
    columns = [one.counts] if isinstance(one, CountedPass) else [one.token_ids, one.positions, *one.routing]
    return SpooledStep(one.number, [column.tobytes() for column in columns])


def _unpacked(settings: RecorderSettings, step: SpooledStep) -> CountedPass | TokenPass:
    if settings.mode != "per_token":
        (counts,) = step.columns
        shape = len(settings.layers), settings.experts
        return CountedPass(step.number, np.frombuffer(counts, np.int32).reshape(shape))
    ids, positions, *routing = step.columns
    tokens = len(ids) // 8
    return TokenPass(
        step.number,
        np.frombuffer(ids, np.int64),
        np.frombuffer(positions, np.int64),
        tuple(np.frombuffer(taken, np.int32).reshape(tokens, -1) for taken in routing),
    )


def _lines(settings: RecorderSettings, passes: list[CountedPass | TokenPass]) -> Iterator[str]:
    if settings.mode == "per_token":
        for one in passes:
            assert isinstance(one, TokenPass)
            yield from _token_lines(settings, one)
        return
    counted = [one for one in passes if isinstance(one, CountedPass)]
    if settings.mode == "per_pass":
        for one in counted:
            yield from _count_lines(settings, one.counts, f"{one.number},")
        return
    total: NDArray[np.int64] = np.zeros((len(settings.layers), settings.experts), np.int64)
    for one in counted:
        total += one.counts
    yield from _count_lines(settings, total)


def _count_lines(settings: RecorderSettings, counts: NDArray[np.integer], prefix: str = "") -> Iterator[str]:
    for layer, row in zip(settings.layers, counts.tolist(), strict=True):
        yield "".join(f"{prefix}{layer},{expert},{count}\n" for expert, count in enumerate(row))


def _token_lines(settings: RecorderSettings, one: TokenPass) -> Iterator[str]:
    routing = [taken.tolist() for taken in one.routing]
    for index, (token, position) in enumerate(zip(one.token_ids.tolist(), one.positions.tolist(), strict=True)):
        for layer, taken in zip(settings.layers, routing, strict=True):
            yield f"{one.number},{index},{token},{position},{layer},{' '.join(map(str, taken[index]))}\n"


def recorder_settings(server: ServerConfig, model: ModelConfig) -> RecorderSettings | None:
    """What the flags ask for; None where they name no mode."""
    mode: Mode
    match server.expert_distribution_recorder_mode:
        case "stat" | "stat_approx":  # approximate is what another way of counting would be
            mode = "stat"
        case "per_pass":
            mode = "per_pass"
        case "per_token":
            mode = "per_token"
        case _:
            return None
    passes = server.expert_distribution_recorder_buffer_size
    if passes is None:
        passes = DEFAULT_PASSES
    folder = server.expert_distribution_recorder_dir or setting("EXPERT_DISTRIBUTION_RECORDER_DIR") or DEFAULT_FOLDER
    moe = model.moe
    return RecorderSettings(
        mode=mode,
        passes=None if passes == -1 else passes,
        folder=Path(folder),
        layers=() if moe is None else tuple(n for n, sparse in enumerate(moe.sparse_layers) if sparse),
        experts=0 if moe is None else moe.num_experts,
    )


def obey(recorder: Recorder | None, action: str, rank: int = 0) -> str | None:
    """Start, stop or dump `rank`'s record. Returns why it could not be done."""
    if recorder is None:
        return "the expert distribution is not recorded: --expert-distribution-recorder-mode is not set"
    match action:
        case "start":
            recorder.start()
        case "stop":
            recorder.stop()
        case _:
            try:
                recorder.dump(rank)
            except OSError as error:
                logger.exception("The expert distribution cannot be written")
                folder = recorder.settings.folder
                return f"the expert distribution cannot be written to {str(folder)!r}: {error.strerror}"
    return None


class OtherRanks(Protocol):
    def record(self, action: str) -> str | None:
        """Their records; returns why one of them could not do it."""
        ...


def recorded(message: RecordExperts, recorder: Recorder | None, others: OtherRanks | None) -> ExpertsRecorded:
    """Carry out what is asked on all ranks, of which this one is the first."""
    elsewhere = others.record(message.action) if others is not None else None
    return ExpertsRecorded(message.key, obey(recorder, message.action) or elsewhere)
