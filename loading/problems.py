"""Errors of a checkpoint, in terms that its owner can act on."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LOGGER = logging.getLogger("indexproj")
# The number of a layer in the name of a tensor or in a sentence, and any number in the name of a file.
_LAYER = r"(?<=layers\.)\d+(?=\.)|(?<=\bmtp\.)\d+(?=\.)|(?<=\blayer )\d+\b"
_NUMBER = re.compile(rf"{_LAYER}|\d+(?=[\w-]*\.safetensors)")


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
    groups: defaultdict[tuple[Any, ...], list[list[str]]] = defaultdict(list)
    for problem in problems:
        text = str(problem)
        layers = re.findall(_LAYER, text)
        pattern = tuple(map(layers.index, layers))  # two layers in one line stay two
        key = pattern, *_NUMBER.split(text)
        groups[key].append(_NUMBER.findall(text))
    lines = []
    for (_, *parts), members in groups.items():
        numbers = ["", *map(_merged, zip(*members, strict=True))]
        lines.append("".join(number + part for number, part in zip(numbers, parts, strict=True)))
    return lines


def _merged(numbers: Iterable[str]) -> str:
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return distinct[0]
    width = min(map(len, distinct))  # shards are numbered with leading zeros
    return f"{{{re.sub('[0-9]+', lambda match: match[0].zfill(width), ranges(map(int, distinct)))}}}"


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
