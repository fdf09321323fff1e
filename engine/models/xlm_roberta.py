"""XLM-RoBERTa (XLMRobertaModel, XLMRobertaForSequenceClassification): RoBERTa, in its tensors too."""

from __future__ import annotations

from engine.layers.encoder_weights import EncoderNames

NAMES = EncoderNames(base="roberta", head_dense="classifier.dense", head_output="classifier.out_proj")
