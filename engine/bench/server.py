"""The server that is measured: found or started, and what it says of itself."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.errors import BenchError, LostConnectionError
from engine.bench.http_client import Target, call, call_json, parse_url
from engine.bench.live_server import LiveServer, running_server
from engine.bench.options import BenchOptions
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.locate import locate
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource

# Weights of tens of gigabytes may have to be read, or downloaded first.
_START_TIMEOUT = 3600.0
# A server of which one process has died ends soon.
_END_WAIT = 10.0


@dataclass(frozen=True)
class Facts:
    """What a server says of itself, and what its model's files say if they are on this machine.

    dtype: of weights and activations; kv_dtype: of the KV pool ("auto" where the server does not say).
    threads: None where the server does not say. isa: what it was told to use.
    """

    name: str
    dtype: str
    kv_dtype: str
    threads: int | None
    context_length: int | None
    source: ModelSource | None
    model: ModelConfig | None
    isa: str = "auto"


@contextmanager
def target_of(options: BenchOptions) -> Iterator[tuple[Target, LiveServer | None]]:
    """The server at --url, or one that is started and ended here."""
    if options.url is not None:
        yield parse_url(options.url, options.api_key), None
        return
    quiet = () if any(flag.startswith("--log-level") for flag in options.server_flags) else ("--log-level", "warning")
    with running_server(*quiet, *options.server_flags, start_timeout=_START_TIMEOUT) as server:
        try:
            yield dataclasses.replace(parse_url(server.url), api_key=options.server.api_key), server
        except LostConnectionError as error:
            raise BenchError(f"{error}{_last_words(server)}") from None


def _last_words(server: LiveServer) -> str:
    """How a server has ended, and its log; empty when it has not."""
    try:
        code = server.launcher.wait(_END_WAIT)
    except subprocess.TimeoutExpired:
        return ""
    return f"; the server ended with exit code {code}:\n{server.log()}"


def read_facts(target: Target, *, started_here: bool) -> Facts:
    """Ask the server. Raises BenchError when it does not answer."""
    info = call_json(target, "GET", "/server_info")
    source, model = _read_model(info, started_here)
    dtype = str(info.get("dtype") or "auto")
    if dtype == "auto" and model is not None and model.dtype is not None:
        dtype = model.dtype  # another server's word for the checkpoint's own; ours says which that is
    kv_dtype = str(info.get("kv_cache_dtype") or "auto")
    return Facts(
        name=str(info.get("served_model_name") or info.get("model_path")),
        dtype=dtype,
        kv_dtype=dtype if kv_dtype == "auto" else kv_dtype,
        threads=info.get("cpu_threads"),
        context_length=info.get("context_length"),
        source=source,
        model=model,
        isa=str(info.get("cpu_isa") or "auto"),
    )


def _read_model(info: dict[str, Any], started_here: bool) -> tuple[ModelSource | None, ModelConfig | None]:
    """The model's files; of a server that was not started here only if its path is here too."""
    path = info.get("model_path")
    if not isinstance(path, str) or not (started_here or Path(path).expanduser().exists()):
        return None, None
    try:
        source = locate(path, revision=info.get("revision"), download_dir=info.get("download_dir"))
        return source, read_model_config(source, info.get("json_model_override_args"))
    except CheckpointError as error:
        if started_here:
            raise BenchError(str(error)) from None
        return None, None


def vocab_size(facts: Facts, options: BenchOptions) -> int:
    """Raises BenchError when nobody knows it."""
    if options.vocab_size is not None:
        return options.vocab_size
    if facts.model is None:
        raise BenchError(
            f"the files of {facts.name} are not on this machine; say how many ids it has with --vocab-size"
        )
    return facts.model.vocab_size


def flush(target: Target) -> bool:
    """Empty the prefix cache. Returns whether the server did it: an administrative key may stand in the way."""
    return call(target, "POST", "/flush_cache?timeout=20").status == 200
