"""Tensor-parallel ranks: what each holds of a model, and how they add up what they have computed."""
