"""An evaluation: greedy answers in batches, scored by the one checker, in a result file that can be continued.

It imports `engines` and below. Start with `run.py`.
"""
