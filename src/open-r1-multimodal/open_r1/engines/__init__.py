"""Who samples and scores completions, each prompt once for its whole group: transformers, vLLM, the check between them.

It imports `models` and below. Start with `shared_prefix.py`.
"""
