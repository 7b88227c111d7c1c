"""Private: one forward(query, key, value, multiplier, ...) per kernel; reference.py is the specification."""
