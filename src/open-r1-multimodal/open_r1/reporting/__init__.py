"""A run's page: what it left behind is read, counted and drawn, from its files alone.

It imports `evaluation` and below, and no torch. Start with `page.py`.
"""
