"""weightfold: networks that find what they hold twice, and fold it away while they train."""

__version__ = "0.1.0"
