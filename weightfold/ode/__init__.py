"""Polynomial systems of differential equations, their equivalences, and networks written as such systems."""
