"""The paper's experiments, run with the library exactly as a user would."""
