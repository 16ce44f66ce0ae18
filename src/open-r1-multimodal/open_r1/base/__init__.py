"""What all other rooms use: errors and how a command ends, files that a crash cannot damage, images, paths.

It imports nothing of the package, and no torch. Start with `errors.py`.
"""
