"""A model before it trains or answers: its family, loading, freezing, adapters, chat template, memory.

It imports `base` and `settings`. Start with `families/`: all that differs between families is there.
"""
