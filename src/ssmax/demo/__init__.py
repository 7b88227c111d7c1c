"""ssmax demo: compares two small trained models that ship with the package, with and without SSMax, in a minute."""
