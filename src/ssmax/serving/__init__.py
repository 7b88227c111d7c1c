"""Engines other than transformers: what they need to run converted models exactly."""
