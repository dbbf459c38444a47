"""Errors of a checkpoint, in terms that its owner can act on."""

from __future__ import annotations

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

LOGGER = logging.getLogger("indexproj")
# The number of a layer in the name of a tensor or in a sentence.
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)|(?<=\bmtp\.)\d+(?=\.)|(?<=\blayer )\d+\b")


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
        text = f"{self.subject}{where}: expected {self.expected}, found {self.found}{advice}"
        # Names come from the file: control characters must not reach a terminal.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ValueError):
    """A failed load, with every problem that was found.

    Attributes:
        problems: at least one, in order of discovery. The message has one line for those that differ only in the layer.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count}:", *(f"  {line}" for line in summarize(self.problems))]))


def summarize(problems: Iterable[Problem]) -> list[str]:
    """One line per problem; those that differ only in layer and file share a line that has their layers as ranges."""
    groups: defaultdict[tuple[str, ...], list[tuple[str, Problem]]] = defaultdict(list)
    for problem in problems:
        match = _NUMBER.search(problem.subject)
        layer = match[0] if match else ""
        mark = functools.partial(lambda layer, number: "\0" if number[0] == layer else number[0], layer)
        texts = (problem.subject, problem.expected, problem.found, problem.advice)
        groups[tuple(_NUMBER.sub(mark, text) for text in texts)].append((layer, problem))
    lines = []
    for marked, members in groups.items():
        problem = members[0][1]
        if len(members) > 1 and "\0" in marked[0]:
            layers = f"{{{ranges({int(layer) for layer, _ in members})}}}"
            subject, expected, found, advice = (text.replace("\0", layers) for text in marked)
            files = {problem.file for _, problem in members}
            file = problem.file if len(files) == 1 else f"{len(files)} files"
            problem = Problem(subject, file, expected, found, advice)
        lines.append(str(problem))
    return lines


def log(warnings: Iterable[Problem], logger: logging.Logger = LOGGER) -> None:
    """Logs all of them as one warning."""
    if lines := summarize(warnings):
        logger.warning("%s", "\n".join(lines))


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)
