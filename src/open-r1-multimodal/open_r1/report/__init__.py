"""The page that a run leaves: what its files hold, as statistics, curves and a browser of completions. No torch."""
