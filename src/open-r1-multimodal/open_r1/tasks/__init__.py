"""Any data set becomes rows that trainers and evaluation take: SAT, CV-Bench, benchmarks, mixtures, your own.

It imports `base` and `answers`, and no torch. Start with `examples.py`.
"""
