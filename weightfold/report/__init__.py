"""The account of a run for a reader: one page that opens without a network."""

from weightfold.report.page import write_report

__all__ = ["write_report"]
