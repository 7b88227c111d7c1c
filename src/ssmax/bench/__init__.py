"""ssmax bench: named cases, each a comparison with plain attention in one process; a wrong contender is not timed."""
