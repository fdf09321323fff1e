"""Whether a model's files are whole, and whether the model fits this machine's memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.checkpoints import hub
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.load_weights import check_fit, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import read_task
from engine.checkpoints.tokenizer import load_tokenizer
from engine.checkpoints.weight_files import file_stamps
from engine.config import ConfigError, ServerConfig
from engine.doctor.finding import Finding
from engine.doctor.software import Gpu
from engine.launcher.resolve import Resolved, resolve

POOL_SHARE = 0.5
"""Of what is free beside the weights, the part that the KV pool takes at most by default."""
GPU_SHARE = 0.88
"""Of a GPU's free memory, the part that weights and pool take by default."""


@dataclass(frozen=True)
class Needs:
    """Bytes of a model: its weights, and keys and values of one token; tokens of its context and of a fixed pool."""

    weights: int
    token: int
    context: int
    pool: int | None


@dataclass(frozen=True)
class Have:
    """Bytes. total: of the machine. available: for a process like this, its cgroup's limit heeded.

    unseen_limit: of a cgroup of version 1, which the server does not heed; None: no limit. pool_share: of what the
    weights leave of `available`, the part that the KV pool takes at most by default. where: behind the numbers.
    """

    total: int
    available: int
    unseen_limit: int | None = None
    pool_share: float = POOL_SHARE
    where: str = ""


def model(config: ServerConfig, have: Have | None) -> Iterator[Finding]:
    """Find the model, read all of it but the numbers themselves, and compare what it needs with what there is.

    have: None where that is not known.
    """
    try:
        resolved = resolve(config)
    except ConfigError as error:
        yield Finding("model", "error", str(error), "change that flag")
        return
    except CheckpointError as error:
        yield _not_found(config, error)
        return
    facts = resolved.facts
    yield Finding("model", "ok", f"{resolved.model.path} ({', '.join(facts.architectures)})")
    yield _tokenizer(resolved)
    yield from _weights(resolved, have)


def _not_found(config: ServerConfig, error: CheckpointError) -> Finding:
    name = config.model_path
    if name is None or Path(name).expanduser().exists() or not hub.is_repository_name(name):
        return Finding("model", "error", str(error), "give --model-path a folder, a .gguf file or a hub id")
    place = hub.cache_place(config.download_dir)
    exists = next(folder for folder in (Path(place), *Path(place).parents) if folder.is_dir())
    free = shutil.disk_usage(exists).free / 1e9
    message = f"{name} is not whole on this machine; the server downloads it at its start ({free:.0f} GB free there)"
    return Finding("model", "warning", message, f"download it before: hf download {name} (into {place})")


def _tokenizer(resolved: Resolved) -> Finding:
    if resolved.tokenizer is None:
        return Finding("tokenizer", "ok", "none is asked for (--skip-tokenizer-init)")
    server = resolved.server
    try:
        loaded = load_tokenizer(resolved.tokenizer, mode=server.tokenizer_mode, chat_template=server.chat_template)
    except CheckpointError as error:
        return Finding("tokenizer", "error", str(error), "complete the folder, or give --tokenizer-path")
    template = "a chat template" if loaded.chat_template else "no chat template"
    return Finding("tokenizer", "ok", f"{resolved.tokenizer.path}, with {template}")


def _weights(resolved: Resolved, have: Have | None) -> Iterator[Finding]:
    import torch

    from engine.kernels.choice import open_backend
    from engine.kernels.kv_cache import kv_bytes_per_token
    from engine.models.registry import build_model

    server, source = resolved.server, resolved.model
    config = read_model_config(source, server.json_model_override_args)
    kv_dtype = server.dtype if server.kv_cache_dtype == "auto" else server.kv_cache_dtype
    try:
        task = read_task(source, config, is_embedding=server.is_embedding)
        # Memory of weights that are not written is not taken, so the largest model can be asked for its size.
        backend = open_backend(server.cpu_isa, 1)
        built = build_model(config, task, dtype=getattr(torch, server.dtype), backend=backend)
        needs = Needs(
            weights=built.weight_bytes,
            token=kv_bytes_per_token(config, getattr(torch, kv_dtype)),
            context=resolved.facts.context_length,
            pool=server.max_total_tokens,
        )
        if server.load_format == "dummy":
            yield Finding("weights", "ok", "random ones are asked for (--load-format dummy)")
        else:
            stamps = file_stamps(source)
            for stamp in stamps:
                with Path(stamp.path).open("rb") as file:
                    file.read(1)
            check_fit(open_weights(source, config, task), built.places, built.ignored)
            size = sum(stamp.size for stamp in stamps) / 1e9
            yield Finding("weights", "ok", f"{len(stamps)} files, {size:.2f} GB, no tensor is missing")
    except (CheckpointError, OSError) as error:
        yield Finding("weights", "error", str(error), "download the model again, or make its files readable")
    except (ConfigError, MemoryError) as error:
        yield Finding("weights", "error", f"{type(error).__name__}: {error}", "a smaller model may fit")
    else:
        if have is not None:
            yield memory(needs, have)


def memory(needs: Needs, have: Have) -> Finding:
    """Whether weights and pool fit."""
    free = have.available - needs.weights
    whole = needs.context * needs.token
    shown = (
        f"weights {needs.weights / 1e9:.2f} GB, a context of {needs.context} tokens {whole / 1e9:.2f} GB; "
        f"{have.available / 1e9:.1f} of {have.total / 1e9:.1f} GB are available{have.where}"
    )
    if free <= 0:
        may_fit = needs.weights < 0.9 * have.total
        advice = "end other programs or raise the cgroup's limit" if may_fit else "serve a smaller model"
        return Finding("memory", "error", shown, f"{advice}; --dtype bfloat16 halves a float32 model")
    if have.unseen_limit is not None and needs.weights + min(whole, free * have.pool_share) > have.unseen_limit:
        message = f"{shown}; a cgroup of version 1 allows {have.unseen_limit / 1e9:.1f} GB"
        return Finding("memory", "error", message, "raise its limit, or give a small --max-total-tokens")
    if needs.pool is not None and needs.pool * needs.token > free:
        return Finding("memory", "error", shown, f"--max-total-tokens {needs.pool}: at most {free // needs.token} fit")
    if needs.pool is None and whole > free * have.pool_share:
        fit = int(free * have.pool_share) // needs.token
        advice = f"give --context-length {max(fit, 1)}, or a --mem-fraction-static near 1"
        return Finding("memory", "warning", f"{shown}; the pool will hold {fit} tokens, not a whole context", advice)
    return Finding("memory", "ok", shown)


def have_now(unseen_limit: int | None) -> Have:
    from engine.kernels.host_memory import available_memory

    return Have(psutil.virtual_memory().total, available_memory(), unseen_limit)


def have_on_gpus(config: ServerConfig, gpus: Sequence[Gpu]) -> Have | None:
    """Of all ranks' GPUs together, each taken for as full and as small as the worst of this machine; None where not
    each rank has one. What may be taken counts as available: the rest is for activations."""
    if len(gpus) < config.tp_size // config.nnodes:
        return None
    share = config.mem_fraction_static or GPU_SHARE
    return Have(
        total=config.tp_size * min(gpu.total for gpu in gpus),
        available=int(config.tp_size * min(gpu.free for gpu in gpus) * share),
        pool_share=1.0,
        where=f" to weights and pool on {config.tp_size} GPU{'' if config.tp_size == 1 else 's'}",
    )
