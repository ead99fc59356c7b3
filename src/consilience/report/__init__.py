"""The page a user gets after a run: one self-contained HTML file, with its plots as PNG beside it."""

from consilience.report.page import Curve, Page, PolicyRow, QuestionRow, ReplyRow, write
from consilience.report.tradeoff import Point, Tradeoff, TradeoffRow, write_tradeoff

__all__ = [
    "Curve",
    "Page",
    "Point",
    "PolicyRow",
    "QuestionRow",
    "ReplyRow",
    "Tradeoff",
    "TradeoffRow",
    "write",
    "write_tradeoff",
]
