"""A model as the difference to another one: alignment, prediction, entropy coding, exact or in steps."""
