"""Samples and scores completions, the prompt of a group once: by transformers, or by vLLM, checked against the policy.

It imports `models` and below. Start with `shared_prefix.py`.
"""
