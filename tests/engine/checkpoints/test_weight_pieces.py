"""Tensors on their way in pieces: how they are cut, that each row comes once, and what places may rely on."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints import weights
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_reader import GgufReader
from engine.checkpoints.load_weights import load_weights, open_weights, random_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.safetensors_reader import SafetensorsReader
from engine.checkpoints.weights import TensorPlace, WeightReader, row_ranges

torch.set_num_threads(1)

KIND = GGMLQuantizationType
# (elements of a piece, rows of a group, elements of the largest piece): cut at every row, within heads, in odd places.
CUTS = [(1, 1, 1), (64 * 8, 4, 64 * 8), (64 * 12, 1, 64 * 12), (64 * 48, 32, 1 << 20)]


@pytest.fixture(params=CUTS, ids=["row by row", "8 rows", "12 rows", "32 rows"])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such pieces that small tensors come in many."""
    for name, value in zip(("_PIECE", "_GROUP", "_LARGEST"), request.param, strict=True):
        monkeypatch.setattr(weights, name, value)


def collected(reader: WeightReader, name: str) -> torch.Tensor:
    """A tensor put together from its pieces, each of whose rows must come once."""
    shape = reader.shapes()[name]
    out = torch.full(shape if shape else (1,), math.nan, dtype=torch.float64)
    seen = torch.zeros(shape[:1] or (1,), dtype=torch.int)
    for start, rows in reader.pieces(name):
        assert rows.is_floating_point() and rows.shape[1:] == shape[1:] and len(rows) > 0
        out[start : start + len(rows)] = rows
        seen[start : start + len(rows)] += 1
    assert out.numel() == 0 or seen.eq(1).all(), name
    span = (len(seen) // 3, len(seen) // 2)
    few = list(reader.pieces(name, span))
    assert all(start < span[1] and span[0] < start + len(rows) for start, rows in few)
    found = {row for start, rows in few for row in range(start, start + len(rows))}
    assert out.numel() == 0 or found >= set(range(*span)), name
    return out.view(shape)


@given(
    shape=st.lists(st.integers(0, 70_000), max_size=2).map(tuple)
    | st.tuples(st.integers(0, 3000), st.integers(0, 300), st.integers(0, 300)),
)
def test_rows_are_cut_into_bounded_pieces_of_whole_groups(shape: tuple[int, ...]) -> None:
    ranges = list(row_ranges(shape))
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    if rows * columns == 0:
        assert ranges == []
        return
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == rows
    for start, stop in ranges:
        assert stop > start
        assert (stop - start) * columns <= 1 << 20 or stop - start == 1
        if columns <= 32_768:
            assert start % 32 == 0 and ((stop - start) % 32 == 0 or stop == rows)
    assert len(ranges) <= 1 + rows * columns // (1 << 18) or columns > 1 << 18, "pieces that are too small"


@pytest.mark.usefixtures("small_pieces")
def test_every_row_of_a_safetensors_file_comes_once(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(70, 64).bfloat16(), "cube": torch.randn(5, 3, 64), "vector": torch.randn(70).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64), "no rows": torch.empty(0, 7), "no columns": torch.empty(7, 0),
    }  # fmt: skip
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for shift in (0, 1):
        # By one byte, which is allowed though nobody's numbers are aligned then.
        header: dict[str, Any] = {"pad": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]}}
        data = b"x" * shift
        for name, tensor in tensors.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            place = [len(data), len(data) + len(raw)]
            header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        reader = SafetensorsReader(tmp_path)
        for name, tensor in tensors.items():
            assert torch.equal(collected(reader, name), tensor.double()), (name, shift)
        assert list(reader.pieces("no rows")) == list(reader.pieces("no columns")) == []
        with pytest.raises(CheckpointError, match=r"model\.safetensors: pad is of type U8"):
            list(reader.pieces("pad"))


def gguf_reader(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]]) -> GgufReader:
    """A llama file with any tensors; its heads have 16 rows."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufReader(path, config_of(path))


def config_of(path: Path) -> ModelConfig:
    config = read_model_config(locate(str(path)))
    assert config.head_dim == 16
    return config


def in_hugging_faces_order(values: torch.Tensor) -> torch.Tensor:
    """The inverse of convert_hf_to_gguf.py's permute."""
    return values.view(-1, 8, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", [KIND.F32, KIND.F16, KIND.BF16, KIND.Q8_0, KIND.Q4_1, KIND.Q5_0])
def test_every_row_of_a_gguf_file_comes_once(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    shapes = {
        "blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (48, 64), "blk.0.attn_v.weight": (70, 64),
        "blk.0.attn_q.bias": (64,), "experts": (5, 3, 64), "vector": (96,),
    }  # fmt: skip
    values = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    kinds = {name: KIND.F32 if name.endswith("bias") else kind for name in shapes}
    encoded = {name: quants.quantize(value, kinds[name]) for name, value in values.items()}
    reader = gguf_reader(tmp_path / "m.gguf", {name: (encoded[name], kinds[name]) for name in shapes})
    found = {name.replace("model.layers.0.self_attn.", ""): collected(reader, name) for name in reader.shapes()}
    expected = {
        name: torch.from_numpy(quants.dequantize(encoded[name], kinds[name])).view(shape).double()
        for name, shape in shapes.items()
    }
    for name, part in (
        ("q_proj.weight", "attn_q.weight"),
        ("k_proj.weight", "attn_k.weight"),
        ("q_proj.bias", "attn_q.bias"),
    ):
        assert torch.equal(found[name], in_hugging_faces_order(expected[f"blk.0.{part}"])), name
    assert torch.equal(found["v_proj.weight"], expected["blk.0.attn_v.weight"])
    assert torch.equal(found["experts"], expected["experts"]) and torch.equal(found["vector"], expected["vector"])


def test_what_of_a_gguf_file_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    q8_1 = np.zeros((2, 40), dtype=np.uint8)
    reader = gguf_reader(
        path, {"odd": (q8_1, KIND.Q8_1), "blk.0.attn_k.weight": (np.zeros((24, 32), np.float32), KIND.F32)}
    )
    with pytest.raises(CheckpointError, match=r"m\.gguf: odd: tensors of kind Q8_1 cannot be dequantised"):
        load_weights(reader, {"odd": TensorPlace(torch.empty(2, 32))}, ignore=("",))
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0\.attn_k\.weight has 24 rows, not heads of 16 in pairs"):
        list(reader.pieces("model.layers.0.self_attn.k_proj.weight"))
    bias = quants.quantize(np.ones(64, dtype=np.float32), KIND.Q8_0)
    path.unlink()
    reader = gguf_reader(path, {"blk.0.attn_q.bias": (bias, KIND.Q8_0)})
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0\.attn_q\.bias is Q8_0"):
        list(reader.pieces("model.layers.0.self_attn.q_proj.bias"))


def test_pieces_of_the_default_model_are_bounded_and_in_whole_groups() -> None:
    source = locate(None)
    reader = open_weights(source, read_model_config(source))
    count = 0
    for name, shape in reader.shapes().items():
        buffers = set()
        for start, rows in reader.pieces(name):
            count += 1
            buffers.add(rows.untyped_storage().data_ptr())
            assert rows.numel() <= 1 << 20
            assert start % 32 == 0 and (len(rows) % 32 == 0 or start + len(rows) == shape[0])
        assert len(buffers) == 1, "one buffer a tensor"
    assert count > len(reader.shapes())


class PackedPlace:
    """A place that is no tensor, as a kernel's layout would be: columns first, in one flat buffer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.nbytes = 2 * math.prod(shape)
        self.span = (0, shape[0])
        self.writers: set[int] = set()
        self.values = torch.full((math.prod(shape),), math.nan, dtype=torch.bfloat16)
        self._busy = threading.Lock()

    def write(self, start: int, rows: torch.Tensor) -> None:
        assert self._busy.acquire(blocking=False), "two pieces of a tensor at once"
        self.writers.add(threading.get_ident())
        count = self.shape[0]
        for row, values in enumerate(rows.flatten(1)):
            self.values[start + row :: count] = values
        self._busy.release()

    def unpacked(self) -> torch.Tensor:
        return self.values.view(-1, self.shape[0]).t().reshape(self.shape)


@pytest.mark.usefixtures("small_pieces")
def test_a_place_need_not_be_a_tensor(tmp_path: Path) -> None:
    values = {f"t{i}": np.random.default_rng(i).normal(size=(50, 64)).astype(np.float32) for i in range(6)}
    reader = gguf_reader(
        tmp_path / "m.gguf", {name: (quants.quantize(v, KIND.Q8_0), KIND.Q8_0) for name, v in values.items()}
    )
    places = {name: PackedPlace((50, 64)) for name in values}
    seen: list[tuple[int, int]] = []
    load_weights(reader, places, ignore=("^model",), progress=lambda done, total: seen.append((done, total)))
    for name, place in places.items():
        assert torch.equal(place.unpacked(), collected(reader, name).bfloat16()), name
        assert len(place.writers) == 1
    assert seen[-1] == (6 * 50 * 64 * 2, 6 * 50 * 64 * 2) and len(seen) == 7
    random_weights(places, seed=4)
    whole = {name: TensorPlace(torch.empty((50, 64), dtype=torch.bfloat16)) for name in values}
    random_weights(whole, seed=4)
    assert all(torch.equal(places[name].unpacked(), whole[name].tensor) for name in values)


def test_what_a_place_raises_ends_the_load(tmp_path: Path) -> None:
    class Full(PackedPlace):
        def write(self, start: int, rows: torch.Tensor) -> None:
            raise MemoryError("the place is full")

    reader = gguf_reader(tmp_path / "m.gguf", {"a": (np.ones((8, 64), dtype=np.float32), KIND.F32)})
    with pytest.raises(MemoryError, match="the place is full"):
        load_weights(reader, {"a": Full((8, 64))}, ignore=("^model",))


@pytest.mark.parametrize("shape", [(1100, 1000), (7, 3), (5, 40, 3), (1_200_000,), (9,), (), (0, 4)])
def test_random_weights_are_one_draw_an_element_however_they_are_cut(shape: tuple[int, ...]) -> None:
    place, norm = TensorPlace(torch.empty(shape)), TensorPlace(torch.zeros(shape))
    random_weights({"a.weight": place, "q_norm.weight": norm}, seed=11)
    digest = hashlib.blake2b(b"11:a.weight", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    bound = 0.02 * 3**0.5
    assert torch.equal(place.tensor, torch.empty(shape).uniform_(-bound, bound, generator=generator))
    assert norm.tensor.eq(1).all()


def test_a_tensor_place_takes_rows_of_any_kind_within_its_bounds() -> None:
    whole = torch.full((10, 8), -1.0, dtype=torch.bfloat16)
    place = TensorPlace(whole[2:8, ::2])
    assert (place.shape, place.nbytes) == ((6, 4), 48)
    rows = torch.arange(12.0, dtype=torch.float64).view(4, 3).t()
    place.write(1, rows)
    assert torch.equal(whole[3:6, ::2], rows.bfloat16())
    assert whole.ne(-1).sum() == 12
    for start in (4, 6, 7):
        with pytest.raises((RuntimeError, IndexError)):
            place.write(start, rows)
    with pytest.raises((RuntimeError, IndexError)):
        place.write(6, rows[:1])
    scalar = TensorPlace(torch.tensor(0.0))
    scalar.write(0, torch.tensor([2.5]))
    assert scalar.tensor.item() == 2.5 and scalar.shape == ()
