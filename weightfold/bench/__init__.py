"""What a network costs where it runs: time, memory and bytes by runtime, and the widths that its kernels like."""

from weightfold.bench.compare import Bench, bench
from weightfold.bench.timing import Times, interleaved
from weightfold.bench.tune import TARGETS, tune

__all__ = ["TARGETS", "Bench", "Times", "bench", "interleaved", "tune"]
