from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_client import Api
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from engine.bench.live_server import LiveServer, running_server
from engine.checkpoints.locate import locate

STRICT = {"TOKENMILL_STRICT": "1"}
"""The environment in which a broken pool invariant ends the server, and so the test."""


@pytest.fixture(scope="session")
def default_server() -> Iterator[LiveServer]:
    """The bundled default model with default settings, shared by all tests that only talk to it."""
    with running_server(env=STRICT) as server:
        yield server


@pytest.fixture(scope="session")
def default_api(default_server: LiveServer) -> Api:
    return Api(default_server.url)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 420 tokens with room for 16,384."""
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=16384)


@pytest.fixture(scope="session")
def tiny_api(tiny_model: Path) -> Iterator[Api]:
    """The tiny model in float32, with the default flags otherwise."""
    with running_server("--dtype", "float32", "--max-total-tokens", "40000", model=tiny_model, env=STRICT) as server:
        yield Api(server.url)


@pytest.fixture(scope="session")
def oracle() -> Any:
    """The default model as `transformers` has it, in float32."""
    torch.set_num_threads(2)
    path = Path(locate(None).path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()
