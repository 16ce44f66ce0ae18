"""Makes a run's report and model card, and compares results, from the files that a run or an evaluation wrote.

It imports `evaluation` and rooms above that, and no torch. Start with `page.py`.
"""
