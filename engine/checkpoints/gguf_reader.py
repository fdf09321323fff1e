"""Weights in GGUF files, under their Hugging Face names and in Hugging Face's order of rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoints.dequantize import dequantize_into
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_config import ROPE_FACTORS
from engine.checkpoints.gguf_file import GgufTensor, read_gguf_header
from engine.checkpoints.gguf_split import split_files
from engine.checkpoints.mapped_file import MappedFile
from engine.checkpoints.model_config import ModelConfig

# ggml's name → Hugging Face's, for the families that are served.
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<suffix>weight|bias)")
# Elements that are converted at once: temporaries of half a MB stay in the cache.
_CHUNK = 131072


def hugging_face_name(ggml_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; names that are not known stay as they are."""
    match = _NAME.fullmatch(ggml_name)
    if match is None:
        return ggml_name
    layer, stem, suffix = match["layer"], match["stem"], match["suffix"]
    if layer is None:
        return f"{_GLOBAL_NAMES[stem]}.{suffix}" if stem in _GLOBAL_NAMES else ggml_name
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[stem]}.{suffix}" if stem in _LAYER_NAMES else ggml_name


@dataclass(frozen=True)
class _Place:
    """head_rows: rows of a head, where the file has them in ggml's rotary order; None: rows are as they should."""

    file: MappedFile
    where: str
    tensor: GgufTensor
    head_rows: int | None


class GgufReader:
    """A WeightReader over a GGUF model in one or several files."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Open the files; no tensor is read. Raises CheckpointError for files that are missing or damaged."""
        self._places: dict[str, _Place] = {}
        files = split_files(path)
        for number, file in enumerate(files):
            header = read_gguf_header(file)
            if header.metadata.get("split.count", 0) not in (0, len(files)) or (
                len(files) > 1 and header.metadata.get("split.no", number) != number
            ):
                raise CheckpointError(
                    f"{file}: is part {header.metadata.get('split.no')} of {header.metadata['split.count']} by its "
                    f"metadata, but part {number} of {len(files)} by its name"
                )
            if number == 0:
                permuted = header.metadata.get("general.architecture") == "llama"
            mapped = MappedFile(file) if header.tensors else None
            for name, tensor in header.tensors.items():
                if name == ROPE_FACTORS or mapped is None:
                    continue
                # llama.cpp's rotary embedding turns neighbours, transformers' the two halves of a head; files of this
                # one architecture have the rows of q and k reordered so that both mean the same.
                rotary = permuted and re.search(r"\.attn_[qk]\.(weight|bias)$", name) is not None
                self._add(
                    hugging_face_name(name), _Place(mapped, str(file), tensor, config.head_dim if rotary else None)
                )

    def _add(self, name: str, place: _Place) -> None:
        if name in self._places:
            raise CheckpointError(f"{place.where}: {place.tensor.name} is {name}, which is there already")
        self._places[name] = place

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.tensor.shape for name, place in self._places.items()}

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        place = self._places[name]
        tensor = place.tensor
        if tuple(destination.shape) != tensor.shape:
            raise CheckpointError(f"{place.where}: {name} is {tensor.shape}, its place {tuple(destination.shape)}")
        if tensor.size == 0:
            return
        target = _as_matrix(destination, place.head_rows)
        data = place.file.bytes_at(tensor.offset, tensor.size).view(target.shape[0], -1)
        step = max(1, _CHUNK // target.shape[1])
        if place.head_rows is not None:
            step = _rows_within_a_head(step, place, target.shape[0])
        direct = place.head_rows is None and target.is_contiguous() and target.device.type == "cpu"
        direct = direct and target.dtype == torch.float32
        scratch = torch.empty(0 if direct else (step, target.shape[1]), dtype=torch.float32)
        for start in range(0, target.shape[0], step):
            rows = data[start : start + step]
            if direct:
                dequantize_into(tensor.kind, rows, target[start : start + step])
                continue
            values = scratch[: rows.shape[0]]
            dequantize_into(tensor.kind, rows, values)
            _store(values, target, start, place.head_rows)
        place.file.forget(tensor.offset, tensor.size)


def _as_matrix(destination: torch.Tensor, head_rows: int | None) -> torch.Tensor:
    """A view [rows, columns] of the destination; a vector is one row, or one column when its entries are permuted."""
    if destination.dim() <= 1:
        return destination.view(1, -1) if head_rows is None else destination.unsqueeze(1)
    return destination.flatten(0, -2)


def _rows_within_a_head(step: int, place: _Place, rows: int) -> int:
    """The most rows up to `step` that come in pairs and fill a head evenly."""
    head_rows = place.head_rows or 1
    if head_rows % 2 or rows % head_rows:
        raise CheckpointError(f"{place.where}: {place.tensor.name} has {rows} rows, not heads of {head_rows} in pairs")
    return max(
        (count for count in range(2, head_rows + 1, 2) if head_rows % count == 0 and count <= step),
        default=2,
    )


def _store(values: torch.Tensor, target: torch.Tensor, start: int, head_rows: int | None) -> None:
    """Copy rows [start, start + n) of the file to where they belong.

    Of a permuted head, row 2j + p of the file is row p × head_rows / 2 + j of Hugging Face's.
    """
    count = values.shape[0]
    if head_rows is None:
        target[start : start + count].copy_(values)
        return
    within = start % head_rows
    first = start - within + within // 2
    for half in (0, 1):
        row = first + half * (head_rows // 2)
        target[row : row + count // 2].copy_(values[half::2])
