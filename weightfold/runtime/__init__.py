"""Files in the runtimes that they were written for: loaded, run, and every refusal in words."""

from weightfold.runtime.loaded import Loaded, Slot
from weightfold.runtime.opened import SUFFIXES, load_file
from weightfold.runtime.require import require

__all__ = ["SUFFIXES", "Loaded", "Slot", "load_file", "require"]
