"""What was done to checkpoints and what it cost, on one page."""

from ssmcompress.report.page import report

__all__ = ["report"]
