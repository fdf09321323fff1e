"""Headers that claim more than their file holds, and checkpoints that lead out of the folders allowed for them."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path

import pytest

from engine.checkpoints.confined import check_files, check_named
from engine.checkpoints.errors import CheckpointError, makes_sense
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.safetensors_reader import SafetensorsReader
from engine.checkpoints.tokenizer import load_tokenizer
from tests.hub_cache import add_repository
from tests.tokenizer_models import source, train_sentencepiece


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(tensors: int, keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return string(b"k") + struct.pack("<IIQ", 9, kind, count) + rest


GGUF_BOMBS = {
    "tensors": gguf(1 << 60, 0, b""),
    "keys": gguf(0, 1 << 60, b""),
    "key length": gguf(0, 1, struct.pack("<Q", 1 << 60)),
    "string": gguf(0, 1, string(b"k") + struct.pack("<IQ", 8, 1 << 60)),
    "numbers": gguf(0, 1, array(10, 1 << 60)),
    "numbers within the bound": gguf(0, 1, array(10, 1 << 24)),
    "strings": gguf(0, 1, array(8, 1 << 60)),
    "strings within the bound": gguf(0, 1, array(8, 1 << 24)),
    "arrays of arrays": gguf(0, 1, array(9, 1 << 24, struct.pack("<IQ", 9, 1 << 24) * 5)),
    "deep arrays": gguf(0, 1, array(9, 1, struct.pack("<IQ", 9, 1) * 5000)),
    "dimensions": gguf(1, 0, string(b"t") + struct.pack("<I", 1 << 31)),
    "extent": gguf(1, 0, string(b"t") + struct.pack("<IQQIQ", 2, 1 << 62, 1 << 62, 0, 0) + bytes(64)),
}


@pytest.mark.parametrize("bomb", GGUF_BOMBS)
def test_gguf_headers_that_claim_too_much(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_BOMBS[bomb] + bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def tensor(shape: list[int], begin: int, end: int) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}).encode()


SAFETENSORS_BOMBS = {
    "header length": struct.pack("<Q", 1 << 60) + b"{}",
    "long header within the bound": struct.pack("<Q", 90_000_000) + b"{}",
    "tensor beyond the file": string(tensor([1 << 20, 1 << 20], 0, 1 << 42)),
    "product that wraps round": string(tensor([1 << 33, 1 << 31], 0, 0)),
    "offsets backwards": string(tensor([1], 4, 0)) + bytes(4),
    "deep JSON": string(b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no JSON": string(b"\xff" * 16),
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", SAFETENSORS_BOMBS)
def test_safetensors_headers_that_claim_too_much(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS_BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            SafetensorsReader(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    index = {"weight_map": {"t": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        SafetensorsReader(tmp_path)


def test_names_are_confined_to_the_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other, outside = tmp_path / "root", tmp_path / "other", tmp_path / "outside"
    for folder in (root / "model", other, outside):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (outside / "back").symlink_to(root / "model")
    roots = [str(root), str(other)]
    hub = tmp_path / "hub"

    def allowed(name: str) -> bool:
        try:
            check_named(name, roots, str(hub))
        except CheckpointError as error:
            assert str(error) == f"{name} does not lie below --allowed-weights-root ({', '.join(roots)})"
            return False
        return True

    assert (
        allowed(str(root / "model")) and allowed(str(root)) and allowed(str(other)) and allowed(str(outside / "back"))
    )
    assert not any(map(allowed, [str(outside), str(root / "link"), f"{root}/../outside", "/etc", "/nowhere"]))
    assert not allowed(f"{root}x") and not allowed("owner/name") and not allowed("owner/name/model.gguf")
    for folder, name in ((root, "in"), (outside, "out")):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    (root / "link.gguf").symlink_to(outside / "out.gguf")
    assert allowed(str(root / "in.gguf"))
    assert not allowed(str(outside / "out.gguf")) and not allowed(str(root / "link.gguf"))
    # A hub id stands for the folder that is cached, wherever that is.
    for folder, name in ((root / "model", "owner/inside"), (outside, "owner/outside")):
        (folder / "config.json").write_text("{}")
        add_repository(hub, name, folder)
    assert allowed("owner/inside") and not allowed("owner/outside")
    monkeypatch.chdir(outside)
    assert not allowed("model") and not allowed("../outside")


def test_files_are_confined_where_their_links_lead(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.safetensors"
    (root / "model" / "1_Dense").mkdir(parents=True)
    outside.write_bytes(b"")
    (root / "blob").write_bytes(b"")
    (root / "model" / "model.safetensors").symlink_to("../blob")
    check_files("model", root / "model", [str(root)])
    for place in ("model/stolen.safetensors", "model/1_Dense/model.safetensors"):
        (root / place).symlink_to(outside)
        with pytest.raises(CheckpointError, match="does not lie below"):
            check_files("model", root / "model", [str(root)])
        (root / place).unlink()


def test_a_single_file_is_confined_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.gguf").write_bytes(b"")
    link = tmp_path / "root" / "model.gguf"
    link.symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(CheckpointError, match="does not lie below"):
        check_files("model", link, [str(tmp_path / "root")])


def test_what_a_file_is_not_to_blame_for() -> None:
    for error in (MemoryError("full"), KeyboardInterrupt(), CheckpointError("known")):
        with pytest.raises(type(error)) as raised, makes_sense("model"):
            raise error
        assert raised.value is error
    with pytest.raises(CheckpointError, match="model: makes no sense: KeyError: 'a'"), makes_sense("model"):
        raise KeyError("a")


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """A tokenizer that only transformers can read, and that names a class of its own."""
    folder, ran = train_sentencepiece(tmp_path / "model", "bpe"), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaTokenizer\nclass Evil(LlamaTokenizer): pass\n"
    for name in ("tokenization_evil.py", "configuration_evil.py", "modeling_evil.py"):
        (folder / name).write_text(code)
    tokenizer = {"AutoTokenizer": ["tokenization_evil.Evil", None], "AutoConfig": "configuration_evil.Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": tokenizer}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": tokenizer}
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(source(folder))
    assert not ran.exists()
