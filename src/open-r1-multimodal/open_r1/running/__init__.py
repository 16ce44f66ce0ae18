"""A run from its command line to its last checkpoint: launch, data, checkpoints, callbacks, what goes wrong.

It imports everything below the trainers. Start with `entry.py`.
"""
