"""ssmax demo: two small trained models that ship with the package, and what SSMax changes in them, in a minute."""
