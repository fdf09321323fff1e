"""What the launcher hands to each process it starts: the resolved configuration, as one JSON file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.server import ServerConfig


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a checkpoint lies on this machine.

    `name` is what the user asked for (and what `/get_model_info` reports); `path` is the folder in
    Hugging Face layout, or the `.gguf` file, that it resolved to.
    """

    name: str
    kind: Literal["folder", "gguf"]
    path: str


class PooledFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model that answers a text with a vector.

    kind: "embedding", or "classifier" (of labels, or one label: a reward or a relevance). width: entries of a vector.
    cross_encoder: it judges pairs of texts (/v1/rerank). score_activation: what a pair's score is put through.
    dimensions: lengths that an embedding may be cut to; empty: any; None: the model was not trained for that.
    segments: kinds of segments that the model tells apart; 0: none.
    """

    kind: Literal["embedding", "classifier"]
    width: int
    cross_encoder: bool = False
    score_activation: Literal["identity", "sigmoid", "tanh", "relu"] = "identity"
    dimensions: list[int] | None = None
    segments: int = 0


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What every process needs to know of the model, so that only the scheduler has to read its config.

    vocab_size: valid token ids are [0, vocab_size).
    context_length: most prompt + output tokens of a request, `--context-length` applied.
    eos_ids: ids that end a generation, from the model's config and the tokenizer, ascending.
    pooled: None for a model that generates.
    judges: its chat template asks whether a document answers a query, with yes or no (/v1/rerank).
    """

    architectures: list[str]
    model_type: str | None
    vocab_size: int
    context_length: int
    eos_ids: list[int]
    pooled: PooledFacts | None = None
    judges: bool = False

    @property
    def is_generation(self) -> bool:
        return self.pooled is None


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One launch: the resolved `ServerConfig` and what the launcher decided beside it.

    tokenizer: where the tokenizer lies; None with --skip-tokenizer-init.
    runtime_dir: private folder (mode 0700) that holds the `ipc://` sockets and this file.
    launcher_pid: a process whose parent is not this pid has been orphaned and must end.
    launch_command: the command line as typed, for `/server_info`.
    epoch: generation of the process tree; grows each time a process is replaced.
    progress_bar: a person watches the terminal while weights load.
    """

    server: ServerConfig
    model: ModelSource
    tokenizer: ModelSource | None
    facts: ModelFacts
    runtime_dir: str
    launcher_pid: int
    launch_command: str
    started_at: float
    epoch: int = 0
    progress_bar: bool = False


def write_run_config(config: RunConfig, path: Path) -> None:
    """Write `config` as JSON to `path`, readable by the user alone (it may hold API keys)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(config))


def read_run_config(path: Path) -> RunConfig:
    """Read what `write_run_config` wrote. Raises `msgspec.ValidationError` on a file that is not one."""
    return msgspec.json.decode(path.read_bytes(), type=RunConfig)
