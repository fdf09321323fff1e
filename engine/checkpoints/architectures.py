"""What the name of an architecture tells: the family that it belongs to, and what its head is for."""

from __future__ import annotations

from typing import Literal, NamedTuple

Head = Literal["generation", "embedding", "classifier", "reward", "masked"]
"""What a checkpoint was made for. "reward": a classifier of one label behind a layer of its own. "masked": an encoder
that fills in masked tokens, and can only embed here."""


class Architecture(NamedTuple):
    """family: the architecture whose hyperparameters it shares. prefix: what the names of its base model's tensors
    begin with."""

    family: str
    prefix: str
    head: Head


def _known() -> dict[str, Architecture]:
    known: dict[str, Architecture] = {}
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        family = f"{name}ForCausalLM"
        known[family] = Architecture(family, "model.", "generation")
        known[f"{name}Model"] = Architecture(family, "model.", "embedding")
        known[f"{name}ForSequenceClassification"] = Architecture(family, "model.", "classifier")
    for name in ("Qwen2", "Qwen3"):
        known[f"{name}ForRewardModel"] = Architecture(f"{name}ForCausalLM", "model.", "reward")
    known["LlamaEmbeddingModel"] = known["LlamaModel"]
    known["Gemma3ForCausalLM"] = Architecture("Gemma3ForCausalLM", "model.", "generation")
    known["Gemma3TextModel"] = Architecture("Gemma3ForCausalLM", "model.", "embedding")
    for name, prefix in (("Bert", "bert."), ("Roberta", "roberta."), ("XLMRoberta", "roberta.")):
        family = f"{name}Model"
        known[family] = Architecture(family, prefix, "embedding")
        known[f"{name}ForMaskedLM"] = Architecture(family, prefix, "masked")
        known[f"{name}ForSequenceClassification"] = Architecture(family, prefix, "classifier")
    known["BertForPreTraining"] = known["BertForMaskedLM"]
    known["Contriever"] = known["BertModel"]
    return known


_KNOWN = _known()
ENCODERS = ("BertModel", "RobertaModel", "XLMRobertaModel")
"""Families that see a text as a whole, and cannot generate."""


def about(architecture: str) -> Architecture:
    """What is known of an architecture; one that has no other names here is its own family, and generates."""
    return _KNOWN.get(architecture) or Architecture(architecture, "model.", "generation")


def architectures_of(family: str) -> list[str]:
    """The names of a family's architectures, its own first."""
    return [family, *(name for name, known in _KNOWN.items() if known.family == family and name != family)]


def canonical_name(name: str, prefix: str, *, bare: bool) -> str:
    """The name under which a model knows a checkpoint's tensor.

    bare: the checkpoint was saved without the `prefix` of its base model. Old checkpoints of encoders also have
    TensorFlow's names for the weight and the bias of a norm.
    """
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return prefix + name if bare else name
