"""A run from its command line to its last checkpoint: launch, data, checkpoints, callbacks, failures, warnings.

It imports all rooms above it. Start with `entry.py`.
"""
