"""Every error that dspace raises on purpose.

Two families, so that a reader knows at once whose move it is:

* :class:`UserError` and below: the input is wrong; the message says where, why and how to mend it.
* :class:`CompilerBug`: dspace is wrong; the message says which pass failed and what to report.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class DspaceError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the CLI exits with."""

    exit_code = 1


class UserError(DspaceError):
    """The user's input (spec, study, arguments, files) is wrong; the message carries the cure."""

    exit_code = 2


class CompilerBug(DspaceError):
    """A pass of dspace broke one of its own promises: never the user's fault."""

    exit_code = 70


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file, with its place and its cure.

    ``line`` and ``column`` count from 1; 0 means that the place is the file as a whole.
    """

    message: str
    file: str = "<spec>"
    line: int = 0
    column: int = 0
    where: str = ""
    """Dotted table path such as ``precision.evidence``."""
    suggestion: str = ""
    """The nearest valid spelling, or empty."""
    cure: str = ""
    """What to write instead."""
    source: str = ""
    """The offending line of the file, shown with a caret under ``column``."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        text = f"{place}: {self.where + ': ' if self.where else ''}{self.message}"
        if self.source:
            text += f"\n    {self.source}\n    {' ' * max(self.column - 1, 0)}^"
        if self.suggestion:
            text += f"\n  did you mean {self.suggestion!r}?"
        if self.cure:
            text += f"\n  cure: {self.cure}"
        return text


@dataclass
class ProblemsError(UserError):
    """All problems of one file, reported at once."""

    problems: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        n = len(self.problems)
        head = "1 problem" if n == 1 else f"{n} problems"
        return head + "\n" + "\n".join(str(p) for p in self.problems)


class SpecError(ProblemsError):
    """A spec file that cannot be compiled."""


class StudyError(ProblemsError):
    """A study file that cannot be run."""


class StorageError(UserError):
    """The storage of a study cannot be read or written; the message says what is left and how to go on."""

    exit_code = 4


class CertificationError(DspaceError):
    """A kernel disagreed with the float64 oracle on this machine and was not handed out."""

    exit_code = 3


class MissingExtra(UserError):
    """An optional dependency is needed; the message names the extra that brings it."""
