"""Prepares a model for training or evaluation: its family, loading, freezing, adapters, chat template, memory.

It imports `base` and `settings`. Start with `families/`, which has everything that differs between families.
"""
