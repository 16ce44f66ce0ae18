"""Reads recipes and overlays into the dataclasses of `open_r1.configs`, and checks their values.

It imports `base`. Start with `recipes.py`.
"""
