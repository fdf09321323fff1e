"""RoBERTa (RobertaModel, RobertaForSequenceClassification): a classifier has a head of its own, and no pooler."""

from __future__ import annotations

from engine.layers.encoder_weights import EncoderNames

NAMES = EncoderNames(base="roberta", head_dense="classifier.dense", head_output="classifier.out_proj")
