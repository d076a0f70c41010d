"""Sharing: what a network shares by construction, and parameters that come to stand in several places."""
