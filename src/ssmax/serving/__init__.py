"""Exports and plugins with which engines other than transformers run converted models exactly."""
