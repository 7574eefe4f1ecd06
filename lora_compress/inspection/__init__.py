"""Looking at finished files: what is in one, and how far two are apart."""
