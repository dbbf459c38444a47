"""Errors of a checkpoint, in terms that its owner can act on."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

LOGGER = logging.getLogger("indexproj")
# The number of a layer in the name of a tensor or in a sentence, and any number in the name of a file.
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)|(?<=\bmtp\.)\d+(?=\.)|(?<=\blayer )\d+\b|\d+(?=[\w-]*\.safetensors)")


@dataclass(frozen=True)
class Problem:
    """One error or warning."""

    subject: str  # full name of the tensor; the file, path or layer if no single tensor is at fault
    file: str  # that holds or should hold the tensor; "" if unknown or if the subject is a file
    expected: str
    found: str
    advice: str = ""  # how to fix it; "" if that is obvious

    def __str__(self) -> str:
        where = f" in {self.file}" if self.file else ""
        advice = f"; {self.advice}" if self.advice else ""
        text = f"{self.subject}{where}: expected {self.expected}, found {self.found}{advice}"
        # Names come from the file: control characters must not reach a terminal.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ValueError):
    """A failed load. The message has one line for problems that differ only in numbers of layers and shards."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)  # every problem that was found, at least one, in order of discovery
        lines = [f"{len(self.problems)} problems:"] * (len(self.problems) > 1)
        super().__init__("\n  ".join(lines + summarize(self.problems)))


def summarize(problems: Iterable[Problem]) -> list[str]:
    """One line per problem; those that differ only in layer and shard share a line that has these as ranges."""
    groups: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for problem in problems:
        groups[tuple(_NUMBER.split(str(problem)))].append(_NUMBER.findall(str(problem)))
    lines = []
    for parts, members in groups.items():
        numbers = ["", *map(_merged, zip(*members, strict=True))]
        lines.append("".join(number + part for number, part in zip(numbers, parts, strict=True)))
    return lines


def _merged(numbers: Iterable[str]) -> str:
    distinct = set(numbers)
    width = min(map(len, distinct))  # shards are numbered with leading zeros
    merged = re.sub("[0-9]+", lambda match: match[0].zfill(width), ranges(map(int, distinct)))
    return merged if len(distinct) == 1 else f"{{{merged}}}"


def log(warnings: Iterable[Problem], logger: logging.Logger = LOGGER) -> None:
    """Logs all of them as one warning."""
    if lines := summarize(warnings):
        logger.warning("%s", "\n".join(lines))


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ends)
