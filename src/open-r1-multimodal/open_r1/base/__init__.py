"""What every other room stands on: errors and how a command ends, files that a crash cannot spoil, images, paths.

It imports nothing of the package, and no torch. Start with `errors.py`.
"""
