"""Models on their way in and out: reading sources, what is taken down of them, writing files."""
