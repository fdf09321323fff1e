"""BERT (BertModel, BertForSequenceClassification): a classifier looks at the first token through the pooler."""

from __future__ import annotations

from engine.layers.encoder_weights import EncoderNames

NAMES = EncoderNames(base="bert", head_dense="bert.pooler.dense", head_output="classifier")
