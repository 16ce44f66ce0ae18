"""A rendered spatial world in SAT's and CV-Bench's own schemas: scenes, questions with true answers, parquet files.

It imports `base` and `tasks`, and no torch. Start with `scene.py`; `python -m open_r1.world` is the command.
"""
