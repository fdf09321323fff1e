"""The files that sentence-transformers puts beside a model: how its hidden states become one vector.

`modules.json` lists what a text goes through: the transformer, a pooling, perhaps dense layers, perhaps a
normalisation. Each module has a folder with a config.json; the transformer's own is sentence_bert_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.checkpoints.config_fields import Fields
from engine.checkpoints.errors import CheckpointError

PoolingMode = Literal["row", "first", "mean", "max"]
DenseActivation = Literal["identity", "tanh", "relu", "gelu"]

_MODES: dict[str, PoolingMode] = {"cls": "first", "mean": "mean", "max": "max", "lasttoken": "row"}
# The modes as keys of their own, as all but the newest files have them.
_MODE_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS: dict[str, DenseActivation] = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_TRANSFORMER_FILES = ("bert", "roberta", "xlm-roberta")


class DenseModule(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer behind the pooling, of weights [outputs, inputs]; path: its folder."""

    path: str
    inputs: int
    outputs: int
    bias: bool
    activation: DenseActivation


class SentenceModules(msgspec.Struct, frozen=True, kw_only=True):
    """What the files say; pooling is None where they have no pooling. max_length: in tokens, special ones included."""

    pooling: PoolingMode | None
    dense: tuple[DenseModule, ...]
    normalise: bool
    max_length: int | None


def read_sentence_modules(folder: Path, hidden_size: int) -> SentenceModules | None:
    """Read the files in `folder`; None where there is no modules.json. Raises CheckpointError."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    pooling: PoolingMode | None = None
    dense: list[DenseModule] = []
    normalise = False
    width = hidden_size
    for kind, where in _modules(path):
        if kind == "Transformer" and where == "":
            continue
        if normalise:
            raise CheckpointError(
                f"{path}: {kind} follows Normalize; a normalisation is served as the last module only"
            )
        if kind == "Pooling":
            if pooling is not None or dense:
                raise CheckpointError(
                    f"{path}: Pooling must be the first module behind the transformer, and the only one"
                )
            pooling = _pooling(folder / where / "config.json")
        elif kind == "Dense":
            dense.append(_dense(folder, where, width))
            width = dense[-1].outputs
        elif kind == "Normalize":
            normalise = True
        elif kind != "Dropout":
            place = f" in {where}" if where else ""
            raise CheckpointError(
                f"{path}: module {kind}{place} is not served; served are Transformer (in the model's own folder), "
                "Pooling, Dense, Dropout and Normalize"
            )
    return SentenceModules(pooling=pooling, dense=tuple(dense), normalise=normalise, max_length=_max_length(folder))


def _modules(path: Path) -> list[tuple[str, str]]:
    """(last part of the type's name, folder) of each module."""
    entries = _json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: is not a list of modules")
    modules = []
    for entry in entries:
        kind, where = entry.get("type"), entry.get("path", "")
        if not isinstance(kind, str) or not isinstance(where, str) or where in (".", "..") or "/" in where:
            raise CheckpointError(f"{path}: {entry!r} is not a module with a type, and a path beside this file")
        modules.append((kind.rpartition(".")[2], where))
    return modules


def _pooling(path: Path) -> PoolingMode:
    raw = _object(path)
    modes = raw.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _MODE_KEYS.items() if raw.get(key) is True]
    elif not isinstance(modes, list):
        modes = [modes]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise CheckpointError(f"{path}: pooling mode is {modes!r}; served is one of {', '.join(_MODES)}")
    return _MODES[modes[0]]


def _dense(folder: Path, where: str, width: int) -> DenseModule:
    path = folder / where / "config.json"
    raw = _object(path)
    fields = Fields(str(path), "Dense", raw, {"activation_function": "torch.nn.modules.activation.Tanh"})
    inputs = fields.positive("in_features")
    if inputs != width:
        raise fields.error("in_features", f"the width of what comes before it ({width})")
    name = fields.text("activation_function")
    short = name.rpartition(".")[2]
    if not name.startswith("torch.nn.modules.") or short not in _ACTIVATIONS:
        raise fields.error("activation_function", f"torch.nn.modules' {', '.join(_ACTIVATIONS)}")
    for key, plain in (("module_input_name", "sentence_embedding"), ("module_output_name", "sentence_embedding")):
        if raw.get(key) not in (None, plain):
            raise fields.error(key, repr(plain))
    return DenseModule(
        path=where,
        inputs=inputs,
        outputs=fields.positive("out_features"),
        bias=fields.flag("bias", True),
        activation=_ACTIVATIONS[short],
    )


def _max_length(folder: Path) -> int | None:
    for name in (*(f"sentence_{kind}_config.json" for kind in _TRANSFORMER_FILES), "config_sentence_transformers.json"):
        path = folder / name
        if path.is_file():
            found = Fields(str(path), "Transformer", _object(path), {}).positive_or_none("max_seq_length")
            if found is not None:
                return found
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    value = _json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
