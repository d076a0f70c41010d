"""Values of weights: codebooks, and their bits in a file."""
