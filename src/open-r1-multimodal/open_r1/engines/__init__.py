"""Samples and scores completions, with a group's prompt processed once, by transformers or by vLLM.

It imports `models` and rooms above that. Start with `shared_prefix.py`.
"""
