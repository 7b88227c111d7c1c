"""ssmax bench: named cases, each a comparison with plain attention in one process, right before it is fast."""
