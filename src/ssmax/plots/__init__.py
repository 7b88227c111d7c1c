"""Shared by all reports: selecting rows, drawing, and HTML pages that open offline. No torch."""
