"""Private: why_not(call) and forward(call) for each kernel; reference.py is the specification."""
