"""Weights as data: canonical forms and hashes, alignment, merging, spectra, differences."""
