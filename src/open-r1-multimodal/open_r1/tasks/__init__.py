"""Turns any data set into rows for training and evaluation: SAT, CV-Bench, benchmarks, mixtures, your own.

It imports `base` and `answers`, and no torch. Start with `examples.py`.
"""
