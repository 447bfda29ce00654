"""The report page of a finished run."""

from scinet.report.page import Example, write_report

__all__ = ["Example", "write_report"]
