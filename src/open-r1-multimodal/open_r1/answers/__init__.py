"""The one answer checker, which rewards, evaluation and reports share, and its parts.

It imports nothing of the package but `base`, and no torch. Start with `checker.py`.
"""

from open_r1.answers.checker import is_correct, judge

__all__ = ["is_correct", "judge"]
