"""Checks a run before it starts; the checks are grouped in families, and each is a function of the run.

It imports every room. Start with `examination.py`.
"""
