"""Look at a recipe, its data, rewards and model before a run does; the command is scripts/doctor.py."""
