"""Errors of a checkpoint, in terms that its owner can act on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One error or warning.

    Attributes:
        subject: full name of the tensor; the file, path or layer if no single tensor is at fault.
        file: file that holds or should hold the tensor; "" if unknown or if the subject is a file.
        expected: what would have been right.
        found: what is there instead.
        advice: how to fix it; "" if that is obvious.
    """

    subject: str
    file: str
    expected: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        where = f" in {self.file}" if self.file else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.subject}{where}: expected {self.expected}, found {self.found}{advice}"


class CheckpointError(ValueError):
    """A failed load, with every problem that was found.

    Attributes:
        problems: at least one, in order of discovery.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count}:", *(f"  {problem}" for problem in self.problems)]))
