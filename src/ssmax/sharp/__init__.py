"""Certified sparse decoding: a query reads only the keys and values that can matter."""
