"""What the launcher hands to each process it starts: the resolved configuration, as one JSON file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.server import ServerConfig

_SERVED = "served.json"
_STANDING = "standing.json"


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


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator has set since the launch, which every process that is started later begins with.

    log_level: of all processes; None: the launch's. log_requests, log_requests_level, log_requests_format: of the
    request log; None: the launch's. step_sleep: seconds of sleep before each step. paused: nothing is to be computed.
    gc_frozen: the collector leaves alone what had been made by then.
    """

    log_level: str | None = None
    log_requests: bool | None = None
    log_requests_level: int | None = None
    log_requests_format: str | None = None
    step_sleep: float = 0.0
    paused: bool = False
    gc_frozen: bool = False


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One launch: the resolved `ServerConfig` and what the launcher decided beside it.

    tokenizer: where the tokenizer lies; None with --skip-tokenizer-init.
    runtime_dir: private folder (mode 0700) that holds the `ipc://` sockets and this file.
    launcher_pid: a process whose parent is not this pid has been orphaned and must end.
    launch_command: the command line as typed, for `/server_info`.
    epoch: generation of the process tree; grows each time a process is replaced.
    launched: names under which the checkpoint of the launch is known, once another one serves (`Served`).
    progress_bar: a person watches the terminal while weights load.
    standing: what an operator has set since.
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
    launched: dict[str, ModelSource] = {}
    standing: Standing = Standing()


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """The weights that serve, where they are not those of the launch any more. source: None: still the launch's."""

    source: ModelSource | None
    weight_version: str


def write_run_config(config: RunConfig, path: Path) -> None:
    """Write `config` as JSON to `path`, readable by the user alone (it may hold API keys)."""
    _write_whole(path, msgspec.json.encode(config))


def read_run_config(path: Path) -> RunConfig:
    """Read what `write_run_config` wrote, with the weights that serve by now (`note_served`), and what has been set
    since (`note_standing`).

    Raises `msgspec.ValidationError` on a file that is not one.
    """
    run = msgspec.json.decode(path.read_bytes(), type=RunConfig)
    with contextlib.suppress(FileNotFoundError):
        standing = msgspec.json.decode((path.parent / _STANDING).read_bytes(), type=Standing)
        run = msgspec.structs.replace(run, standing=standing)
    try:
        served = msgspec.json.decode((path.parent / _SERVED).read_bytes(), type=Served)
    except FileNotFoundError:
        return run
    return with_served(run, served)


def note_served(runtime_dir: str, served: Served) -> None:
    """Note what weights serve from now on, for whoever is started after this."""
    _write_whole(Path(runtime_dir) / _SERVED, msgspec.json.encode(served))


def note_standing(runtime_dir: str, standing: Standing) -> None:
    """Note what an operator has set, for whoever is started after this. Raises OSError."""
    _write_whole(Path(runtime_dir) / _STANDING, msgspec.json.encode(standing))


def with_served(run: RunConfig, served: Served) -> RunConfig:
    """`run` under the weights that serve: they go by their new name everywhere; the tokenizer is the launch's all
    along."""
    server = msgspec.structs.replace(run.server, weight_version=served.weight_version)
    source = served.source
    if source is None:
        return msgspec.structs.replace(run, server=server)
    names = [name for name in (run.model.name, run.server.served_model_name) if name]
    return msgspec.structs.replace(
        run,
        model=source,
        launched=run.launched or dict.fromkeys(names, run.model),
        server=msgspec.structs.replace(
            server,
            model_path=source.name,
            served_model_name=source.name,
            tokenizer_path=run.server.tokenizer_path or run.model.name,
            load_format="auto",
        ),
    )


def _write_whole(path: Path, content: bytes) -> None:
    """Write a private file that nobody ever finds half written."""
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    fresh.replace(path)
