"""Building the engine at start: threads, weights, the size of the KV pool."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from engine.checkpoints.load_weights import load_weights, open_weights, random_weights
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import Task, read_task
from engine.config import ConfigError, RunConfig, ServerConfig
from engine.kernels.choice import open_backend
from engine.kernels.host_memory import available_memory
from engine.kernels.kv_cache import allocate_kv_cache, kv_bytes_per_token, step_cache
from engine.kernels.parts import part_bytes
from engine.kernels.table import Backend, Program
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.lifecycle import Limits
from scheduler_proc.company import ALONE, Company, Needs
from scheduler_proc.weights import Checkpoint, launched_checkpoint

logger = logging.getLogger(__name__)

POOL_SHARE = 0.5
"""Share of the memory still free after the weights that the KV pool may take."""
POOL_CONTEXTS = 16
"""The default pool holds at most so many full contexts: more would only fill memory with old prefixes, while a GPU's
memory is there for nothing else."""
GPU_SHARE = 0.88
"""Share of a GPU's free memory that weights and pool take by default; the rest is for activations and the head."""
MAX_RUNNING = 64
LARGEST_CHUNK = 1024
"""No `prefill_chunk` of a backend on a CPU is larger."""
WHOLE_STEP = 1024
"""Prompt tokens of a step by default where prompts are read whole: many short texts make one large product."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model with its KV pool, and what both allow. checkpoint: what the model was filled from."""

    model: Model
    checkpoint: Checkpoint
    backend: Backend
    program: Program
    task: Task
    reads_whole: bool
    limits: Limits


def load_engine(
    config: RunConfig, *, started: float, beat: Callable[[], None] = lambda: None, company: Company = ALONE
) -> Engine:
    """Size the pool, load the weights, allocate the pool. `started`: time.monotonic() at the start of the process.
    `beat`: called again and again, as a sign of life. company: the other ranks.
    """
    server = config.server
    device = "cuda" if server.device == "cuda" else "cpu"  # the launcher has found out what auto means
    seconds = {"imports": time.monotonic() - started}
    model_config = read_model_config(config.model, server.json_model_override_args)
    task = read_task(config.model, model_config, is_embedding=server.is_embedding)
    context = config.facts.context_length
    exchange = company.join(part_bytes(largest_step(server, model_config, task, context), model_config.hidden_size))
    backend = open_backend(server.cpu_isa, server.cpu_threads, exchange, company.place, device=device)
    available = free_memory(device)
    dtype = DTYPES[server.dtype]
    model = build_model(model_config, task, dtype=dtype, backend=backend)
    kv_dtype = dtype if server.kv_cache_dtype == "auto" else DTYPES[server.kv_cache_dtype]
    token_bytes = kv_bytes_per_token(model.held, kv_dtype) // (model_config.num_layers if model.reads_whole else 1)

    def size(host: Needs) -> int:
        check_fits(host.weight_bytes, host.available)
        if model.reads_whole:
            return whole_steps(server, context)
        return pool_size(server, context, host.token_bytes, host.weight_bytes, host.available)

    slots, needs = company.settle(Needs(model.weight_bytes, token_bytes, available), size)
    mark = time.monotonic()
    checkpoint = launched_checkpoint(config)
    beat()
    fill_weights(model, config, model_config, beat)
    beat()
    seconds["weights"] = time.monotonic() - mark
    mark = time.monotonic()
    if model.reads_whole:
        budget = step_budget(server)
        running = server.max_running_requests or budget
        cache = step_cache(model.held, slots, kv_dtype, device)
    else:
        budget = backend.prefill_chunk if server.chunked_prefill_size is None else server.chunked_prefill_size
        running = server.max_running_requests or MAX_RUNNING
        cache = allocate_kv_cache(model.held, slots, kv_dtype, device)
    program = model.program(cache)
    seconds["pool"] = time.monotonic() - mark
    gc.collect()
    gc.freeze()
    longest = longest_request(context, slots, task)
    limits = Limits(
        max_total_num_tokens=slots,
        max_req_input_len=longest - 5 if task.kind == "generation" else longest + 1,
        max_running_requests=running,
        chunked_prefill_size=budget,
        weight_gb=needs.weight_bytes / 1e9,
        kvcache_gb=slots * needs.token_bytes / 1e9,
        available_gb=available / 1e9,
        load_seconds=seconds,
    )
    logger.info(
        "%s, %s, on %s: weights %.2f GB, KV pool %.2f GB for %d tokens (%.1f GB were free); %s",
        model_config.architecture, str(dtype).removeprefix("torch."), backend.name, limits.weight_gb,
        limits.kvcache_gb, slots, limits.available_gb,
        ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items()),
    )  # fmt: skip
    return Engine(model, checkpoint, backend, program, task, model.reads_whole, limits)


def whole_steps(server: ServerConfig, context: int) -> int:
    """Most tokens of a step where prompts are read whole."""
    budget = step_budget(server)
    return max(budget, context) + (server.max_running_requests or budget)  # prompts of one token come beside the budget


def largest_step(server: ServerConfig, config: ModelConfig, task: Task, context: int) -> int:
    """Most tokens of a step, before the backend has a say in it."""
    if config.encoder is not None or task.pooling != "row" or not (config.causal or task.kind == "generation"):
        return whole_steps(server, context)
    chunk = LARGEST_CHUNK if server.chunked_prefill_size is None else server.chunked_prefill_size
    budget = server.max_prefill_tokens if chunk < 0 else chunk
    return budget + (server.max_running_requests or MAX_RUNNING)


def step_budget(server: ServerConfig) -> int:
    """Prompt tokens of a step where prompts are read whole (so that -1, no chunks, is no choice)."""
    given = server.chunked_prefill_size
    return min(WHOLE_STEP, server.max_prefill_tokens) if given is None or given < 0 else given


def fill_weights(
    model: Model, config: RunConfig, model_config: ModelConfig, beat: Callable[[], None] = lambda: None
) -> None:
    """Read the checkpoint into the model, with a progress bar where a person is watching."""
    if config.server.load_format == "dummy":
        random_weights(model.places, seed=config.server.random_seed or 0, beat=beat)
        return
    reader = open_weights(config.model, model_config, model.task)
    with tqdm(
        desc="Loading weights", unit="B", unit_scale=True, disable=not config.progress_bar, file=sys.stderr
    ) as bar:

        def advance(done: int, total: int) -> None:
            beat()
            bar.total = total
            bar.update(done - bar.n)

        load_weights(reader, model.places, ignore=model.ignored, progress=advance)


def free_memory(device: str) -> int:
    """Bytes that the model and its KV pool may take: of the host, or of this process's GPU."""
    if device == "cpu":
        return available_memory()
    return torch.cuda.mem_get_info()[0]


def check_fits(weight_bytes: int, available: int) -> None:
    """Raise ConfigError for a model that is larger than the free memory, before it fills that."""
    if weight_bytes > available:
        raise ConfigError(
            f"the weights take {weight_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free; "
            "a smaller model or --dtype bfloat16 may fit"
        )


def pool_size(server: ServerConfig, context: int, token_bytes: int, weight_bytes: int, available: int) -> int:
    """Tokens in the KV pool: the flag's, else by memory, on a CPU at most `POOL_CONTEXTS` whole contexts.

    available: bytes free before the weights were loaded. Raises ConfigError when not even a short prompt fits.
    """
    share = server.mem_fraction_static
    if share is None and server.device == "cuda":
        share = GPU_SHARE
    budget = available * share - weight_bytes if share is not None else (available - weight_bytes) * POOL_SHARE
    by_memory = int(budget // token_bytes)
    if server.max_total_tokens is not None:
        if server.max_total_tokens * token_bytes > available - weight_bytes:
            raise ConfigError(
                f"--max-total-tokens {server.max_total_tokens} needs {server.max_total_tokens * token_bytes / 1e9:.1f} "
                f"GB; {max(available - weight_bytes, 0) / 1e9:.1f} GB are free beside the weights"
            )
        slots = server.max_total_tokens
    else:
        slots = by_memory if server.device == "cuda" else min(by_memory, POOL_CONTEXTS * context)
    if slots < 16:
        raise ConfigError(
            f"the KV pool would hold {slots} tokens, and needs at least 16: {available / 1e9:.1f} GB are free, "
            f"the weights take {weight_bytes / 1e9:.1f} GB, a token {token_bytes} bytes"
        )
    return slots


def longest_request(context: int, slots: int, task: Task) -> int:
    """Most prompt + output tokens of a request that context and pool can hold (contract §5.3)."""
    return min(context - 1, slots - 1) if task.kind == "generation" else min(context, slots)
