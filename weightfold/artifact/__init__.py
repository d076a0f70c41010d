"""The layout of saved models, readable without torch; and files that are written whole or not at all."""

from weightfold.artifact.files import drafting, make_folder, write_bytes, write_json
from weightfold.artifact.format import Attribute, Builder, Input, Resized, Structure, read_structure
from weightfold.artifact.header import Header, fingerprint, read_header

__all__ = [
    "Attribute",
    "Builder",
    "Header",
    "Input",
    "Resized",
    "Structure",
    "drafting",
    "fingerprint",
    "make_folder",
    "read_header",
    "read_structure",
    "write_bytes",
    "write_json",
]
