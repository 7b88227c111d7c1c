"""The training loop, its checkpoints and its ranks. Knows neither recipes nor variants."""
