"""Weights in GGUF files, under their Hugging Face names and in Hugging Face's order of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.checkpoints.dequantize import PLAIN, dequantize_into
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_config import ROPE_FACTORS
from engine.checkpoints.gguf_file import KINDS, GgufTensor, read_gguf_header
from engine.checkpoints.gguf_split import split_files
from engine.checkpoints.mapped_file import MappedFile, as_floats
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.plain_file import WeightFile
from engine.checkpoints.weights import overlap, row_ranges

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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Gemma's blocks have norms on both sides, and one name means another norm than elsewhere.
_GEMMA3_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# A matrix of one row there, a vector here.
_ONE_ROW = ".shared_expert_gate.weight"
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<suffix>weight|bias)")


def hugging_face_name(ggml_name: str, arch: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; names that are not known stay as they are."""
    match = _NAME.fullmatch(ggml_name)
    if match is None:
        return ggml_name
    layer, stem, suffix = match["layer"], match["stem"], match["suffix"]
    if layer is None:
        return f"{_GLOBAL_NAMES[stem]}.{suffix}" if stem in _GLOBAL_NAMES else ggml_name
    names = _GEMMA3_NAMES if arch == "gemma3" else _LAYER_NAMES
    return f"model.layers.{int(layer)}.{names[stem]}.{suffix}" if stem in names else ggml_name


@dataclass(frozen=True)
class _Source:
    """head_rows: rows of a head, where the file has them in ggml's rotary order; None: rows are as they should.

    offset: what the file's values have more than Hugging Face's.
    """

    file: WeightFile
    where: str
    tensor: GgufTensor
    head_rows: int | None
    offset: float


class GgufReader:
    """A WeightReader over a GGUF model in one or several files."""

    def __init__(self, path: Path, config: ModelConfig, open_file: Callable[[Path], WeightFile] = MappedFile) -> None:
        """Open the files; no tensor is read. Raises CheckpointError for files that are missing or damaged."""
        self._sources: dict[str, _Source] = {}
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
                arch = str(header.metadata.get("general.architecture"))
            opened = open_file(file) if header.tensors else None
            for name, tensor in header.tensors.items():
                if name == ROPE_FACTORS or opened is None:
                    continue
                # llama.cpp's rotary embedding turns neighbours, transformers' the two halves of a head; files of this
                # one architecture have the rows of q and k reordered so that both mean the same.
                own_name = hugging_face_name(name, arch)
                if own_name.endswith(_ONE_ROW) and len(tensor.shape) == 1:
                    tensor = replace(tensor, shape=(1, *tensor.shape))
                rotary = arch == "llama" and re.search(r"\.attn_[qk]\.(weight|bias)$", name) is not None
                # Gemma's norms scale by 1 + weight, and its files hold that sum.
                offset = 1.0 if arch == "gemma3" and name.endswith("norm.weight") else 0.0
                source = _Source(opened, str(file), tensor, config.head_dim if rotary else None, offset)
                self._add(own_name, source)

    def _add(self, name: str, source: _Source) -> None:
        if name in self._sources:
            raise CheckpointError(f"{source.where}: {source.tensor.name} is {name}, which is there already")
        self._sources[name] = source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.tensor.shape for name, source in self._sources.items()}

    def pieces(self, name: str, span: tuple[int, int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        source = self._sources[name]
        tensor = source.tensor
        if tensor.size == 0:
            return
        order = None if source.head_rows is None else _order_in_file(source, source.head_rows)
        # A vector is read by the blocks of its entries, anything else by its rows.
        entries = KINDS[tensor.kind][1] if len(tensor.shape) == 1 else 1
        rows = tensor.shape[0] // entries if tensor.shape else 1
        columns = math.prod(tensor.shape) // rows
        row_bytes = tensor.size // rows
        # Rows that change places are read all at once: those of a piece lie all over the tensor.
        data = None if order is None else source.file.bytes_at(tensor.offset, tensor.size).view(rows, -1)
        scratch = torch.empty(0)
        for start, stop in row_ranges((rows, columns)):
            if not overlap(start * entries, stop * entries, span):
                continue
            if data is None or order is None:
                encoded = source.file.bytes_at(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
                encoded = encoded.view(stop - start, -1)
            else:
                encoded = data.index_select(0, order[start:stop])
            if encoded.shape[0] > scratch.shape[0]:
                scratch = torch.empty((encoded.shape[0], columns))
            values = _decoded(source, encoded, scratch[: encoded.shape[0]])
            values = values.view(-1, *tensor.shape[1:])
            yield start * entries, values - source.offset if source.offset else values
            if order is None:
                source.file.forget(tensor.offset + start * row_bytes, encoded.numel())
        source.file.forget(tensor.offset, tensor.size)


def _order_in_file(source: _Source, head_rows: int) -> torch.Tensor:
    """Of each row in Hugging Face's order, its number in a file with permuted heads.

    Row p × head_rows / 2 + j of a head is row 2j + p of it in the file.
    """
    tensor = source.tensor
    if len(tensor.shape) == 1 and KINDS[tensor.kind][1] > 1:
        raise CheckpointError(
            f"{source.where}: {tensor.name} is {KINDS[tensor.kind][0]}, whose entries cannot change places"
        )
    if head_rows % 2 or tensor.shape[0] % head_rows:
        raise CheckpointError(
            f"{source.where}: {tensor.name} has {tensor.shape[0]} rows, not heads of {head_rows} in pairs"
        )
    return torch.arange(tensor.shape[0]).view(-1, head_rows // 2, 2).transpose(1, 2).flatten()


def _decoded(source: _Source, encoded: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Rows of the file as numbers: the very bytes where they are numbers already, else float32 in `scratch`."""
    name = KINDS[source.tensor.kind][0]
    if name in PLAIN:
        return as_floats(encoded, PLAIN[name])
    try:
        dequantize_into(source.tensor.kind, encoded, scratch)
    except CheckpointError as error:
        raise CheckpointError(f"{source.where}: {source.tensor.name}: {error}") from None
    return scratch
