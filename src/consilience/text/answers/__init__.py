"""Answers: read them from replies, decide which are the same, group them into classes for a vote.

Voting happens on answers, never on texts. :func:`extract` reads a reply's answer, :func:`compare` says whether two are
equal, different or unknown, :class:`AnswerClasses` numbers a question's distinct answers as its draws arrive. The
import is light: the standard library alone, no process, no computer algebra. The kinds ``code`` and ``sql`` are
compared by what they do: :mod:`~consilience.text.answers.behaviour` holds their classes.
"""

from .calls import call_answer
from .classes import NO_ANSWER, AnswerClasses, Classes, classes_of, equal_to_gold
from .equality import Equality, canonical, compare
from .extract import compile_pattern, extract
from .kinds import BEHAVIOUR_KINDS, KINDS, check_kind

__all__ = [
    "BEHAVIOUR_KINDS",
    "KINDS",
    "NO_ANSWER",
    "AnswerClasses",
    "Classes",
    "Equality",
    "call_answer",
    "canonical",
    "check_kind",
    "classes_of",
    "compare",
    "compile_pattern",
    "equal_to_gold",
    "extract",
]
