"""What is wrong with a run before it starts: checks in families, each a function of the run.

It imports every room. Start with `examination.py`.
"""
