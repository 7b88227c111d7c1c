"""Parts of any long job: rows, files that are written whole or not at all, a run's folder, signals, progress. No torch."""
