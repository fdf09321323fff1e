"""Building the engine at start: threads, weights, the size of the KV pool."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from engine.checkpoints.load_weights import load_weights, open_weights, random_weights
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import Task, read_task
from engine.config import ConfigError, RunConfig, ServerConfig
from engine.kernels.choice import open_backend
from engine.kernels.host_memory import available_memory
from engine.kernels.kv_cache import KvCache, allocate_kv_cache, kv_bytes_per_token, step_cache
from engine.kernels.parts import part_bytes
from engine.kernels.table import Backend, Program
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.lifecycle import Limits
from scheduler_proc.company import ALONE, Company, Needs
from scheduler_proc.decode_graphs import DecodeGraphs, capture_decodes
from scheduler_proc.gpus import GPUS, Gpus, open_on_gpu
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
    config: RunConfig, *, started: float, beat: Callable[[], None] = lambda: None, company: Company = ALONE,
    gpus: Gpus = GPUS,
) -> Engine:  # fmt: skip
    """Size the pool, load the weights, allocate the pool. `started`: time.monotonic() at the start of the process.
    `beat`: called again and again, as a sign of life. company: the other ranks. gpus: what `--device cuda` means.
    """
    server = config.server
    device = gpus.kind if server.device == "cuda" else "cpu"  # the launcher has found out what auto means
    clock = Stopwatch(started)
    clock.lap("imports")
    model_config = read_model_config(config.model, server.json_model_override_args)
    task = read_task(config.model, model_config, is_embedding=server.is_embedding)
    context = config.facts.context_length
    backend = _backend(server, model_config, task, context, company, gpus)
    available, dtype = free_memory(device), DTYPES[server.dtype]
    kv_dtype = dtype if server.kv_cache_dtype == "auto" else DTYPES[server.kv_cache_dtype]
    model = build_model(model_config, task, dtype=dtype, backend=backend)
    slots, needs = _settle(server, model, kv_dtype, context, available, company)
    clock.start()
    checkpoint = launched_checkpoint(config)
    beat()
    fill_weights(model, config, model_config, beat)
    beat()
    clock.lap("weights")
    cache, budget, running = _allocate(server, model, backend, slots, kv_dtype, device)
    program = model.program(cache)
    clock.lap("pool")
    graphs = DecodeGraphs()
    if task.kind == "generation":
        graphs = capture_decodes(program, server, running, context, lambda: free_memory(device), beat)
    if graphs.sizes:
        clock.lap("graphs")
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
        load_seconds=clock.seconds,
        graph_sizes=graphs.sizes,
        graph_gb=graphs.gigabytes,
    )
    logger.info(
        "%s, %s, on %s: weights %.2f GB, KV pool %.2f GB for %d tokens (%.1f GB were free); %s",
        model_config.architecture, str(dtype).removeprefix("torch."), backend.name, limits.weight_gb,
        limits.kvcache_gb, slots, limits.available_gb,
        ", ".join(f"{name} {spent:.2f} s" for name, spent in clock.seconds.items()),
    )  # fmt: skip
    return Engine(model, checkpoint, backend, program, task, model.reads_whole, limits)


@dataclass(slots=True)
class Stopwatch:
    """mark: time.monotonic() at the start of the phase that goes on. seconds: of those that are done."""

    mark: float
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        self.mark = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.mark = now - self.mark, now


def _backend(
    server: ServerConfig, config: ModelConfig, task: Task, context: int, company: Company, gpus: Gpus
) -> Backend:
    """The kernels, once this rank has met the others."""
    if server.device == "cuda":
        return open_on_gpu(server, company, gpus)
    part = part_bytes(largest_step(server, config, task, context), config.hidden_size)
    return open_backend(server.cpu_isa, server.cpu_threads, company.join(part), company.place)


def _settle(
    server: ServerConfig, model: Model, kv_dtype: torch.dtype, context: int, available: int, company: Company
) -> tuple[int, Needs]:
    """The slots of the pool, as all ranks have agreed on, and what this host needs (rank 0: what all need)."""
    layers = model.config.num_layers if model.reads_whole else 1
    token_bytes = kv_bytes_per_token(model.held, kv_dtype) // layers

    def size(memory: Needs) -> int:
        check_fits(memory.weight_bytes, memory.available)
        if model.reads_whole:
            return whole_steps(server, context)
        return pool_size(server, context, memory.token_bytes, memory.weight_bytes, memory.available)

    needs = Needs(model.weight_bytes, token_bytes, available)
    return company.settle(needs, size, apart=server.device == "cuda")


def _allocate(
    server: ServerConfig, model: Model, backend: Backend, slots: int, kv_dtype: torch.dtype, device: str
) -> tuple[KvCache, int, int]:
    """The pool, the prompt tokens of a step, and the requests in one."""
    if model.reads_whole:
        budget = step_budget(server)
        return step_cache(model.held, slots, kv_dtype, device), budget, server.max_running_requests or budget
    budget = backend.prefill_chunk if server.chunked_prefill_size is None else server.chunked_prefill_size
    cache = allocate_kv_cache(model.held, slots, kv_dtype, device)
    return cache, budget, server.max_running_requests or MAX_RUNNING


def whole_steps(server: ServerConfig, context: int) -> int:
    """Most tokens of a step where prompts are read whole."""
    budget = step_budget(server)
    return max(budget, context) + (server.max_running_requests or budget)  # prompts of one token come beside the budget


def largest_step(
    server: ServerConfig, config: ModelConfig, task: Task, context: int, largest_chunk: int = LARGEST_CHUNK
) -> int:
    """Most tokens of a step. largest_chunk: no `prefill_chunk` of the backend that is to come is larger."""
    if config.encoder is not None or task.pooling != "row" or not (config.causal or task.kind == "generation"):
        return whole_steps(server, context)
    chunk = largest_chunk if server.chunked_prefill_size is None else server.chunked_prefill_size
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
