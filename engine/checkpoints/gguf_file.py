"""The header of a GGUF file: its metadata and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).

The gguf package has a reader too, but it wraps every element of every array in a numpy view: 3.0 s for the
default model (97,000 strings), where the whole server is to start in 5 s. This one takes 0.04 s, and needs neither
numpy nor torch, which the launcher and the tokenizer process never import.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.errors import CheckpointError

# Bounds on what a header may claim, so that a hostile one cannot make us allocate without end. Real vocabularies have
# some 300,000 tokens and 600,000 merges; the longest real strings are whole tokenizer.json files.
MAX_ELEMENTS = 1 << 24
MAX_STRING_BYTES = 1 << 26
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4

_STRING = 8
_ARRAY = 9
_BOOL = 7
# GGUF's value types with a fixed width → struct format character.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# GGMLQuantizationType → (name, elements of a block, bytes of a block). The same as gguf.GGML_QUANT_SIZES (a test sees
# to it); copied because importing gguf costs 0.2 s and brings numpy.
KINDS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    shape: in torch's order (rows first; the file has it reversed). kind: a gguf.GGMLQuantizationType's value.
    offset: first byte, from the start of the file. size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key → plain Python value (arrays are lists). data_offset: first byte of the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_offset: int


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Read the header of a GGUF file without touching the tensors' data.

    Raises CheckpointError, which names the file and what is wrong, for anything that is not a whole GGUF file of
    version 2 or 3, little-endian; OSError messages come as CheckpointError too.
    """
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path}: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderParser(data, size).header()
    except _HeaderError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


class _HeaderError(Exception):
    """What is wrong with the header, before the file's name is put to it."""


class _HeaderParser:
    """A position in the file's bytes. Every read checks that what is claimed still fits into the file."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data = data
        self.size = size
        self.at = 0
        self.elements_left = MAX_ELEMENTS

    def header(self) -> GgufHeader:
        self._check_magic()
        num_tensors = self._u64("the number of tensors")
        num_keys = self._u64("the number of metadata keys")
        if num_tensors > MAX_TENSORS or num_keys > MAX_TENSORS:
            raise _HeaderError(
                f"claims {num_tensors} tensors and {num_keys} metadata keys (at most {MAX_TENSORS} are accepted)"
            )
        metadata = self._metadata(num_keys)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _HeaderError(f"general.alignment is {alignment!r}, not a power of two")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_offset = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, relative in infos:
            if name in tensors:
                raise _HeaderError(f"tensor {name!r} is there twice")
            tensors[name] = self._placed(name, shape, kind, relative, alignment, data_offset)
        return GgufHeader(metadata=metadata, tensors=tensors, data_offset=data_offset)

    def _check_magic(self) -> None:
        if self.data[:4] != b"GGUF":
            raise _HeaderError(f"is not a GGUF file (starts with {self.data[:4]!r})")
        self.at = 4
        version = self._u32("the version")
        if version & 0xFFFF == 0 and version:
            raise _HeaderError("is a big-endian GGUF file; only little-endian ones can be read")
        if version not in (2, 3):
            raise _HeaderError(f"is of GGUF version {version}; only 2 and 3 can be read")

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            key = self._string(f"the name of metadata key {number}")
            if key in metadata:
                raise _HeaderError(f"metadata key {key!r} is there twice")
            metadata[key] = self._value(self._u32(f"the type of {key!r}"), key, 0)
        return metadata

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        value = self._fixed(kind, 1, key)[0]
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str, depth: int) -> list[Any]:
        if depth > MAX_ARRAY_DEPTH:
            raise _HeaderError(f"metadata key {key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self._u32(f"the element type of {key!r}")
        count = self._u64(f"the length of {key!r}")
        if count > self.elements_left:
            raise _HeaderError(
                f"metadata key {key!r} claims {count} elements (at most {MAX_ELEMENTS} are accepted in all)"
            )
        self.elements_left -= count
        if kind == _STRING:
            return self._strings(count, key)
        if kind == _ARRAY:
            return [self._array(key, depth + 1) for _ in range(count)]
        values = self._fixed(kind, count, key)
        return [value != 0 for value in values] if kind == _BOOL else list(values)

    def _strings(self, count: int, key: str) -> list[str]:
        """The hot loop: one step a token of the vocabulary. Kept free of calls to our own functions."""
        data, at, size = self.data, self.at, self.size
        unpack = _U64.unpack_from
        values: list[str] = []
        append = values.append
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                start = at + 8
                at = start + length
                if at > size or length > MAX_STRING_BYTES:
                    raise _HeaderError(f"element {len(values)} of {key!r} claims {length} bytes; {self._ends()}")
                append(str(data[start:at], "utf-8"))
        except struct.error:
            raise _HeaderError(f"element {len(values)} of {key!r} is cut off; {self._ends()}") from None
        except UnicodeDecodeError:
            raise _HeaderError(f"element {len(values)} of {key!r} is not UTF-8") from None
        self.at = at
        return values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("the name of a tensor")
        num_dims = self._u32(f"the number of dimensions of tensor {name!r}")
        if num_dims > MAX_DIMENSIONS:
            raise _HeaderError(f"tensor {name!r} claims {num_dims} dimensions (at most {MAX_DIMENSIONS})")
        dims = self._fixed(10, num_dims, f"the shape of tensor {name!r}")
        kind = self._u32(f"the kind of tensor {name!r}")
        return name, tuple(reversed(dims)), kind, self._u64(f"the offset of tensor {name!r}")

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: int, relative: int, alignment: int, data_offset: int
    ) -> GgufTensor:
        if kind not in KINDS:
            raise _HeaderError(f"tensor {name!r} is of the unknown kind {kind}")
        kind_name, block, block_bytes = KINDS[kind]
        elements = 1
        for extent in shape:
            elements *= extent
        row = shape[-1] if shape else 1
        if row % block:
            raise _HeaderError(f"tensor {name!r} has rows of {row} elements; {kind_name} needs a multiple of {block}")
        size = elements // block * block_bytes
        offset = data_offset + relative
        if relative % alignment:
            raise _HeaderError(f"tensor {name!r} lies at offset {relative}, which is not a multiple of {alignment}")
        if offset + size > self.size:
            raise _HeaderError(f"tensor {name!r} {shape} lies at bytes {offset} to {offset + size}; {self._ends()}")
        return GgufTensor(name=name, shape=shape, kind=kind, offset=offset, size=size)

    def _string(self, what: str) -> str:
        length = self._u64(f"the length of {what}")
        if length > min(MAX_STRING_BYTES, self.size - self.at):
            raise _HeaderError(f"{what} claims {length} bytes; {self._ends()}")
        value = self.data[self.at : self.at + length]
        self.at += length
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            raise _HeaderError(f"{what} is not UTF-8") from None

    def _fixed(self, kind: int, count: int, what: str) -> tuple[Any, ...]:
        if kind not in _FIXED:
            raise _HeaderError(f"{what} is of the unknown value type {kind}")
        layout = f"<{count}{_FIXED[kind]}"
        length = struct.calcsize(layout)
        if length > self.size - self.at:
            raise _HeaderError(f"{what} claims {count} values of {length} bytes; {self._ends()}")
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += length
        return values

    def _u32(self, what: str) -> int:
        return int(self._fixed(4, 1, what)[0])

    def _u64(self, what: str) -> int:
        return int(self._fixed(10, 1, what)[0])

    def _ends(self) -> str:
        return f"the file ends at byte {self.size} (is it cut off?)"
