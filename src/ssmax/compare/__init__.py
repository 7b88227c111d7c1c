"""ssmax evaluate: long-context measurements of several models side by side, in a folder that continues."""
