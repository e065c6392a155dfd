"""Adapters made of adapters, or of models: sums, other ranks, differences; and how far apart two are."""
