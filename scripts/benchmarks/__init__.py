"""What benchmark.py times, a file each."""
