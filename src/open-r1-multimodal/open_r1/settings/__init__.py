"""What a recipe may say: recipes and overlays become the dataclasses of `open_r1.configs`, their values checked.

It imports `base`. Start with `recipes.py`.
"""
