"""An evaluation: greedy answers in batches, scored by the one checker, in a result file that can be continued.

It imports `engines` and rooms above that. Start with `run.py`.
"""
