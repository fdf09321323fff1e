"""Broken checkpoints, 10,000 of them: each opens, or is refused with a CheckpointError that names its file."""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.load_weights import open_weights
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.safetensors_reader import SafetensorsReader
from engine.checkpoints.task import read_task
from engine.checkpoints.tokenizer import encode, load_tokenizer, read_chat_template, read_eos_ids
from engine.checkpoints.weights import WeightReader
from engine.config import ModelSource
from engine.wire.failures import is_failure
from tests.mutations import cases, mutated, mutated_json
from tests.tiny_models import tiny_qwen2_moe
from tests.tokenizer_models import SPECIALS, byte_level

SLOWEST = 20.0
"""Seconds that one case may take, on a machine that does other things as well."""
ROOM = 2 << 30
"""Bytes of address space that all cases together may take: one that claims absurd sizes meets a MemoryError."""

Outcomes = Counter[str]


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2_moe(tmp_path_factory.mktemp("folder") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small llama with its tokenizer, and how long its header is."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    backend = byte_level()
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    layer = {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.ffn_up": (64, 32)}
    for name, shape in {"token_embd": (len(tokens), 32), **layer}.items():
        kind = GGMLQuantizationType.Q8_0 if "ffn" in name else GGMLQuantizationType.F16
        values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes(), read_gguf_header(path).data_offset


@contextmanager
def case(outcomes: Outcomes, path: Path) -> Iterator[None]:
    """The block may raise a CheckpointError that names a file of the checkpoint, and nothing else."""
    started = time.monotonic()
    try:
        yield
    except CheckpointError as error:
        assert str(path) in str(error), f"{error} does not say of which file it is"
        outcomes["refused"] += 1
    else:
        outcomes["opened"] += 1
    assert time.monotonic() - started < SLOWEST


def read_weights(reader: WeightReader) -> None:
    for name in reader.shapes():
        for start, rows in reader.pieces(name):
            assert start >= 0
            rows.float().sum()


def open_all(source: ModelSource, number: int) -> None:
    """What a launch reads, the weights of every eighth."""
    config = read_model_config(source)
    read_task(source, config, is_embedding=False)
    reader = open_weights(source, config, mapped=number % 2 == 0)
    if number % 8 == 0:
        read_weights(reader)


def open_tokenizer(source: ModelSource) -> None:
    read_eos_ids(source)
    read_chat_template(source)
    tokenizer = load_tokenizer(source)
    try:
        encode(tokenizer, "The quick <s> brown fox")
    except BaseException as error:  # ends its request with a 500, as any failure does
        if not is_failure(error):
            raise


def check(outcomes: Outcomes, count: int) -> None:
    assert sum(outcomes.values()) == count
    assert min(outcomes["opened"], outcomes["refused"]) > count / 100, outcomes


def test_gguf(gguf_bytes: tuple[bytes, int], tmp_path: Path) -> None:
    data, header = gguf_bytes
    rng, outcomes, path = random.Random("gguf"), Outcomes(), tmp_path / "model.gguf"
    source = ModelSource(name="model", kind="gguf", path=str(path))
    # Most of the header are tokens and merges; what comes before and behind them is where structure is.
    spans = (data.index(b"tokenizer.ggml.tokens") + 60, header, len(data))
    for number in range(cases(4_500)):
        within = rng.choice(spans)
        if rng.random() < 0.4:  # the tensors' places
            start = data.index(b"token_embd.weight") - 8
            path.write_bytes(data[:start] + mutated(rng, data[start:], header - start))
        else:
            path.write_bytes(mutated(rng, data, within))
        with case(outcomes, path):
            open_all(source, number)
            if number % 3 == 0:
                open_tokenizer(source)
    check(outcomes, cases(4_500))


def test_safetensors(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    rng, outcomes, path = random.Random("safetensors"), Outcomes(), tmp_path / "model.safetensors"
    for number in range(cases(2_500)):
        if number % 2:
            text = json.dumps(mutated_json(rng, header)).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        else:
            path.write_bytes(mutated(rng, data, rng.choice((8, 8 + length, len(data)))))
        with case(outcomes, path):
            reader = SafetensorsReader(tmp_path)
            if number % 4 < 2:
                read_weights(reader)
    check(outcomes, cases(2_500))


def test_index(folder: Path, tmp_path: Path) -> None:
    names = list(SafetensorsReader(folder).shapes())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    each(tmp_path / "model.safetensors.index.json", index, 500, lambda: read_weights(SafetensorsReader(tmp_path)))


JSON_FILES = {
    "config.json": (1_300, lambda source: open_all(source, 1)),
    "generation_config.json": (100, lambda source: open_all(source, 1)),
    "tokenizer_config.json": (500, open_tokenizer),
    "tokenizer.json": (600, open_tokenizer),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files(name: str, folder: Path, tmp_path: Path) -> None:
    count, read = JSON_FILES[name]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    whole = json.loads((folder / name).read_bytes())
    (tmp_path / name).unlink()
    source = ModelSource(name="model", kind="folder", path=str(tmp_path))
    each(tmp_path / name, whole, count, lambda: read(source))


def each(path: Path, whole: Any, count: int, read: Callable[[], None]) -> None:
    """Read `count` mutations of the JSON file: two thirds of values, one of bytes."""
    rng, outcomes = random.Random(path.name), Outcomes()
    data = json.dumps(whole).encode()
    for number in range(cases(count)):
        path.write_bytes(mutated(rng, data) if number % 3 == 0 else json.dumps(mutated_json(rng, whole)).encode())
        with case(outcomes, path.parent):
            read()
    check(outcomes, cases(count))
