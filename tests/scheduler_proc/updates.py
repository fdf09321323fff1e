"""A scheduler in this process whose weights can be updated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from backends import backend
from simulation import Sent, scheduler_over

from engine.checkpoints.load_weights import load_weights, open_weights, random_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelFacts, RunConfig, ServerConfig
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.weights import UpdateWeights, WeightsUpdated
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.weight_updates import WeightUpdates
from scheduler_proc.weights import Weights, launched_checkpoint

PATIENCE = 5.0
"""Seconds that a thread's work may take at most before the pump looks again."""


@dataclass
class Served:
    scheduler: Scheduler
    sent: Sent
    weights: Weights

    @property
    def model(self) -> Model:
        return self.weights.model

    def update(self, path: Path | str, key: int = 1000, **fields: Any) -> None:
        self.scheduler.handle(UpdateWeights(key=key, model_path=str(path), **fields))

    def pump(self, *, turns: int | None = None) -> None:
        """Take turns until nothing is left to do, or so many of them."""
        scheduler, left = self.scheduler, 20_000 if turns is None else turns
        while left and (scheduler.requests or scheduler.generation.updating):
            left -= 1
            scheduler.turn()
            scheduler.planner.memory.check(scheduler.planner.running)
            if scheduler.generation.halted or not scheduler.requests:
                assert scheduler.updates is not None
                scheduler.updates.wait(PATIENCE)
        assert left or turns is not None, "the scheduler makes no progress"

    def answer(self) -> WeightsUpdated:
        """The newest answer about weights."""
        return [message for message in self.sent.others if isinstance(message, WeightsUpdated)][-1]

    def refused(self, path: Path | str, **fields: Any) -> str:
        """The message of an update that must leave the weights alone, bit for bit."""
        before = digest(self.model)
        self.update(path, **fields)
        self.pump()
        assert digest(self.model) == before
        answer = self.answer()
        assert not answer.success and answer.model_path is None and answer.weight_version == "default"
        return answer.message


def served(
    path: Path | str | None, name: str = "reference", pool: int = 400, dtype: str = "float32", **server: Any
) -> Served:
    """A scheduler over the checkpoint at `path`, as a server would have it that was just launched."""
    source = locate(None if path is None else str(path))
    config = read_model_config(source)
    model = build_model(config, dtype=getattr(torch, dtype), backend=backend(name))
    launch = RunConfig(
        server=ServerConfig(**server), model=source, tokenizer=None, launch_command="", runtime_dir="", launcher_pid=0,
        started_at=0.0, facts=ModelFacts(
            architectures=[config.architecture], model_type=None, vocab_size=config.vocab_size, context_length=1000,
            eos_ids=[],
        ),
    )  # fmt: skip
    checkpoint = launched_checkpoint(launch)
    if checkpoint.random:
        random_weights(model.places, seed=launch.server.random_seed or 0)
    else:
        load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    weights = Weights(model, checkpoint, launch)
    cache = allocate_kv_cache(config, pool, model.dtype, "cpu")
    scheduler, sent = scheduler_over(
        model.backend, model.program(cache), pool, longest=min(1000, pool - 1), eos_ids=[],
        updates=WeightUpdates(weights),
    )  # fmt: skip
    return Served(scheduler, sent, weights)


def digest(model: Model, only: str = "") -> str:
    """A hash of the weights as they lie in the model, those of them whose name has `only` in it."""
    found = hashlib.sha256()
    for name in sorted(name for name in model.places if only in name):
        found.update(model.places[name].read().view(torch.uint8).numpy())
    return found.hexdigest()
