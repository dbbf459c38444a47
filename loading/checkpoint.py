"""A safetensors checkpoint on disk: its headers, and the byte ranges that are asked for."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import CONFIG, Config
from .headers import Header
from .names import is_projection, parse
from .problems import CheckpointError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The headers of a checkpoint, read at once; tensors are read later and one by one.

    Attributes:
        path: the directory that holds the files.
        headers: name -> Header of every projection tensor.
        neighbours: names of the indexers' other tensors (wq_b, k_norm, ...).
        tensors: how many tensors there are in all.
        unread: shards that are not there or not readable, and hold nothing of the projection according to the index.
        config: what config.json says; nothing where there is none.
        is_whole: False for one file out of several, which cannot tell what the others hold.
        problems: faults of the files themselves.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the headers.

        Args:
            path: a directory with `model.safetensors.index.json` or `model.safetensors`, or one .safetensors file.

        Raises:
            CheckpointError: there is no checkpoint at path, or its index cannot be read.
        """
        path = Path(path)
        if path.name == INDEX:
            path = path.parent
        self.headers: dict[str, Header] = {}
        self._shards: dict[str, Any] = {}  # opened once, so that headers and data are of the same file
        self.neighbours: list[str] = []
        self.tensors = 0
        self.unread: list[str] = []
        self.problems: list[Problem] = []
        try:
            self.path = path if path.is_dir() else path.parent
            self.is_whole = path.is_dir() or path.name == SINGLE
            promised = _promised(path)
        except OSError as error:  # a name that no file can have
            raise CheckpointError([Problem(str(path), "", "the path of a checkpoint", str(error))]) from error
        for file, names in promised.items():
            self._read_headers(file, None if names is None else list(filter(is_projection, names)))
        self.config = self._read_config()

    def _read_headers(self, file: str, promised: list[str] | None) -> None:
        names: list[str] = []
        instead, advice = "no such tensor", "index and file are of two exports: fetch both again"
        try:
            _refuse_other_than_file(self.path / file)
            shard: Any = safe_open(self.path / file, framework="pt")
            names = shard.keys()
            for tensor in filter(None, map(parse, names)):
                if tensor.matrix is None:
                    self.neighbours.append(tensor.name)
                else:
                    data = shard.get_slice(tensor.name)
                    self._add(Header(tensor.name, data.get_dtype(), tuple(data.get_shape()), file))
                    self._shards[file] = shard
        except (SafetensorError, OSError) as error:
            if promised == []:
                self.unread.append(file)
                return
            instead, advice = f"an unreadable file ({error})", ""
            if isinstance(error, FileNotFoundError):
                instead, advice = "no such file", "fetch the rest of the checkpoint"
            elif isinstance(error, SafetensorError):
                advice = "the file is truncated, corrupt or a Git LFS pointer: fetch it again"
            if promised is None:
                self.problems.append(Problem(file, "", "a readable safetensors file", str(error), advice))
        self.tensors += len(names)
        for name in sorted(set(promised or ()).difference(names)):
            self.problems.append(Problem(name, file, "the tensor that the index puts there", instead, advice))

    def _add(self, header: Header) -> None:
        first = self.headers.setdefault(header.name, header)
        if first is not header:
            expected = f"it in one file, {first.file}"
            self.problems.append(Problem(header.name, header.file, expected, "a second copy"))

    def _read_config(self) -> Config:
        if not os.path.lexists(self.path / CONFIG):
            return Config()
        try:
            config = Config.of(_read_json(self.path / CONFIG))
        except CheckpointError as error:
            self.problems += error.problems
            return Config()
        self.problems += config.problems
        return config

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor), shard by shard; nothing else is read.

        A tensor is a view of the mapped file, to be copied by who keeps it.
        """
        for name in sorted(names, key=lambda name: self.headers[name].file):
            yield name, self._shards[self.headers[name].file].get_tensor(name)


def _promised(path: Path) -> dict[str, list[str] | None]:
    """file -> names that the index promises there; None where there is no index."""
    if path.is_file() and path.suffix == ".safetensors":
        return {path.name: None}
    if not os.path.lexists(path / INDEX):
        if (path / SINGLE).is_file():
            return {SINGLE: None}
        shards = len(list(path.glob("*.safetensors")))
        kinds = (
            (shards, f"{shards} .safetensors files without their index"),
            (path.is_dir(), "a directory with neither"),
            (path.exists(), "another kind of file"),
        )
        found = next((kind for holds, kind in kinds if holds), "no such file or directory")
        advice = "give the directory of a downloaded checkpoint, or one .safetensors file"
        raise CheckpointError([Problem(str(path), "", f"{INDEX} or {SINGLE}", found, advice)])
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError([Problem(INDEX, "", 'a "weight_map" from tensor names to files', "none")])
    promised: defaultdict[str, list[str]] = defaultdict(list)
    problems = []
    for name, file in weight_map.items():
        if isinstance(file, str) and _is_file_name(file):
            promised[file].append(name)
        else:
            problems.append(Problem(name, INDEX, "the name of a file beside the index", repr(file)))
    if problems:
        raise CheckpointError(problems)
    return dict(sorted(promised.items()))


def _is_file_name(name: str) -> bool:
    try:
        return os.fsencode(name) not in (b"", b".", b"..") and Path(name).name == name
    except UnicodeEncodeError:
        return False


def _refuse_other_than_file(path: Path) -> None:
    """Raises OSError for a pipe, which would be waited for, or a directory; what is missing is for open() to say."""
    if path.exists() and not path.is_file():
        raise OSError("not a file")


def _read_json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        doubled = [key for key, count in keys.items() if count > 1]
        if doubled:
            raise ValueError(f"{', '.join(doubled)} more than once")
        return dict(pairs)

    try:
        _refuse_other_than_file(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError([Problem(path.name, "", "readable JSON", str(error))]) from error
    if not isinstance(value, dict):
        raise CheckpointError([Problem(path.name, "", "a JSON object", type(value).__name__)])
    return value
