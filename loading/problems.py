"""What is wrong with a checkpoint, in the words of the person who has to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault.

    Attributes:
        subject: the tensor's full name, or the file's, path's or layer's where no tensor is concerned.
        file: the file the tensor is in or should be in; "" where it is unknown or the subject itself.
        expected: what would have been right.
        found: what is there.
        advice: what to do about it; "" where that is plain.
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
    """A load that cannot be done, with every problem of the attempt.

    Attributes:
        problems: at least one, in order of discovery.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count}:", *(f"  {problem}" for problem in self.problems)]))
