"""What is wrong with a run before it starts: checks by family, each a function that gives a finding.

It imports every room. Start with `examination.py`.
"""
