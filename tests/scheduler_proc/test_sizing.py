"""Sizing at start."""

from __future__ import annotations

import pytest

from engine.checkpoints.task import Task
from engine.config import ConfigError, ServerConfig
from scheduler_proc.load import GPU_SHARE, POOL_CONTEXTS, check_fits, longest_request, pool_size

GB = 10**9


def test_a_model_larger_than_memory_is_refused_before_it_is_read() -> None:
    check_fits(8 * GB, 8 * GB)
    with pytest.raises(ConfigError, match=r"weights take 9\.0 GB, and 8\.0 GB of memory are free"):
        check_fits(9 * GB, 8 * GB)


def test_the_pool_takes_its_share_of_memory_but_no_more_than_some_contexts() -> None:
    server = ServerConfig()
    assert pool_size(server, 100, 1000, GB, 2 * GB) == 100 * POOL_CONTEXTS
    assert pool_size(server, 10**6, 1000, GB, 2 * GB) == GB // 2 // 1000
    assert pool_size(ServerConfig(mem_fraction_static=0.75), 10**6, 1000, GB, 2 * GB) == GB // 2 // 1000
    assert pool_size(ServerConfig(max_total_tokens=77), 10**6, 1000, GB, 2 * GB) == 77


def test_the_pool_of_a_gpu_takes_what_weights_and_activations_leave() -> None:
    server = ServerConfig(device="cuda")
    assert pool_size(server, 100, 1000, GB, 4 * GB) == (int(4 * GB * GPU_SHARE) - GB) // 1000
    assert pool_size(ServerConfig(device="cuda", mem_fraction_static=0.5), 100, 1000, GB, 4 * GB) == GB // 1000


def test_a_pool_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-total-tokens 2000000 needs 2\.0 GB; 1\.0 GB are free"):
        pool_size(ServerConfig(max_total_tokens=2_000_000), 10**6, 1000, GB, 2 * GB)
    with pytest.raises(ConfigError, match="would hold 0 tokens, and needs at least 16"):
        pool_size(ServerConfig(), 10**6, 1000, GB, GB)


def test_the_longest_request_fits_context_and_pool() -> None:
    assert longest_request(1000, 5000, Task()) == 999 and longest_request(1000, 300, Task()) == 299
    # Nothing is generated behind a text that is embedded.
    embedding = Task(kind="embedding", width=8)
    assert longest_request(1000, 5000, embedding) == 1000 and longest_request(1000, 300, embedding) == 300
