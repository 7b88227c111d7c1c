"""What any long job needs: rows, files written whole, a folder that continues, signals, progress. Loads no torch."""
