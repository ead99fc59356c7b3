"""The page a user gets after a run: one self-contained HTML file, with its plots as PNG beside it."""

from consilience.report.page import Curve, Page, PolicyRow, QuestionRow, ReplyRow, write

__all__ = ["Curve", "Page", "PolicyRow", "QuestionRow", "ReplyRow", "write"]
