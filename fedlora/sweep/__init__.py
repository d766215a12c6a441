"""A grid of runs: plan, folder, comparison, estimate."""
