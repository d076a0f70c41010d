"""The layout of saved models, readable without torch; and files that are written whole or not at all."""

from weightfold.artifact.coded import STEP_LIMIT, STEPS, CodedTensor, nearest_step, row_bits, step_value
from weightfold.artifact.files import drafting, make_folder, write_bytes, write_json
from weightfold.artifact.format import Attribute, Builder, Input, Resized, Structure, read_structure
from weightfold.artifact.header import Header, fingerprint, read_header
from weightfold.artifact.matrix import coded_bits, decode, encode
from weightfold.artifact.packed import Packed, PackedSizes, promised_bytes, read_packed, write_packed
from weightfold.artifact.packing import packed_bytes

__all__ = [
    "STEPS",
    "STEP_LIMIT",
    "Attribute",
    "Builder",
    "CodedTensor",
    "Header",
    "Input",
    "Packed",
    "PackedSizes",
    "Resized",
    "Structure",
    "coded_bits",
    "decode",
    "drafting",
    "encode",
    "fingerprint",
    "make_folder",
    "nearest_step",
    "packed_bytes",
    "promised_bytes",
    "read_header",
    "read_packed",
    "read_structure",
    "row_bits",
    "step_value",
    "write_bytes",
    "write_json",
    "write_packed",
]
