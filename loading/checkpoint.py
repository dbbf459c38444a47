"""A safetensors checkpoint on disk: its headers, and single tensors on request."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import CONFIG, Config
from .headers import Header, parse
from .problems import CheckpointError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADVICE = {  # part of an error of safetensors -> what to do
    "unknown variant": "the installed safetensors does not know that dtype: install a newer one",
    "not valid UTF-8": "safetensors opens UTF-8 paths only: rename the file or its directory",
    "": "the file is truncated, corrupt or a Git LFS pointer: fetch it again",
}


class Checkpoint:
    """The headers of a checkpoint; its tensors are read one by one.

    path: a directory with `model.safetensors.index.json` or `model.safetensors`, or a .safetensors file. Raises
    CheckpointError if there is no checkpoint or its index is unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.name == INDEX:
            path = path.parent
        self.headers: dict[str, Header] = {}  # of every projection tensor, by name
        self._shards: dict[str, Any] = {}  # kept open: headers and data come from the same file
        self.neighbours: list[str] = []  # names of the indexers' other tensors (wq_b, k_norm, ...)
        self.tensors = 0  # number of all tensors
        self.unread: list[str] = []  # shards missing or unreadable, but without the projection according to the index
        self.problems: list[Problem] = []  # of the files themselves
        try:
            self.path = path if path.is_dir() else path.parent  # directory of the files
            self.is_whole = path.is_dir() or path.name == SINGLE  # False for one file of several
            promised = _promised(path)
        except OSError as error:  # not a valid file name
            raise CheckpointError([Problem(str(path), "", "the path of a checkpoint", str(error))]) from error
        for file, names in promised.items():
            self._read_headers(file, names)
        self.config = Config()  # empty if there is no config.json
        if os.path.lexists(self.path / CONFIG):
            try:
                self.config = Config.of(_read_json(self.path / CONFIG))
            except CheckpointError as error:
                self.problems += error.problems
        self.problems += self.config.problems

    def _read_headers(self, file: str, promised: list[str] | None) -> None:
        names: list[str] = []
        instead, advice = "no such tensor", "index and file are of different exports: fetch both again"
        try:
            _check_is_file(self.path / file)
            shard: Any = safe_open(self.path / file, framework="pt")
            names = shard.keys()
            for tensor in filter(None, map(parse, names)):
                if tensor.matrix is None:
                    self.neighbours.append(tensor.name)
                    continue
                data = shard.get_slice(tensor.name)
                header = Header(tensor.name, data.get_dtype(), tuple(data.get_shape()), file)
                first = self.headers.setdefault(tensor.name, header)
                if first is not header:
                    self.problems.append(Problem(tensor.name, file, f"it only in {first.file}", "a second copy"))
                self._shards[file] = shard
        except (SafetensorError, OSError) as error:
            if promised == []:
                self.unread.append(file)
                return
            instead, advice = f"an unreadable file ({error})", ""
            if isinstance(error, FileNotFoundError):
                instead, advice = "no such file", "fetch the rest of the checkpoint"
            elif isinstance(error, SafetensorError):
                advice = next((advice for sign, advice in _ADVICE.items() if sign in str(error)), _ADVICE[""])
            if promised is None:
                self.problems.append(Problem(file, "", "a readable safetensors file", str(error), advice))
        self.tensors += len(names)
        for name in sorted(set(promised or ()).difference(names)):
            self.problems.append(Problem(name, file, "the tensor that the index puts there", instead, advice))

    def read(self, name: str) -> Tensor:
        """A projection tensor, as a view of the memory-mapped file."""
        return self._shards[self.headers[name].file].get_tensor(name)  # type: ignore[no-any-return]


def _promised(path: Path) -> dict[str, list[str] | None]:
    """file -> projection tensors that the index puts there; None without an index."""
    if path.suffix == ".safetensors" and os.path.lexists(path) and not path.is_dir():
        return {path.name: None}
    if not os.path.lexists(path / INDEX):
        # DeepSeek's own inference code writes a file per rank, each with all of the indexers.
        for single in (path / SINGLE, *sorted(path.glob("model0-mp*.safetensors"))):
            if os.path.lexists(single):
                return {single.name: None}
        expected, advice = "the directory of a checkpoint or a .safetensors file", ""
        found = "another file" if os.path.lexists(path) else "no such file or directory"
        if path.is_dir():
            expected, found = f"{INDEX} or {SINGLE}", "no .safetensors file in it"
            if any(path.glob("*.safetensors")):
                found, advice = "other .safetensors files", "fetch the index, or give one file"
        raise CheckpointError([Problem(str(path), "", expected, found, advice)])
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise CheckpointError([Problem(INDEX, "", 'a "weight_map" from tensor names to files', "none")])
    promised: defaultdict[str, list[str]] = defaultdict(list)
    problems = []
    for name, file in weight_map.items():
        if isinstance(file, str) and file.isprintable() and file not in ("", "..") and Path(file).name == file:
            tensor = parse(name)
            promised[file] += [name] if tensor and tensor.matrix else []
        else:
            problems.append(Problem(name, INDEX, "the name of a file beside the index", repr(file)))
    if problems:
        raise CheckpointError(problems)
    return dict(sorted(promised.items()))


def _check_is_file(path: Path) -> None:
    """Raises OSError for a directory, a pipe, which would block, or a bad link; open() reports a missing file."""
    if path.is_symlink() and not path.exists():
        raise OSError("a link that leads nowhere")
    if path.exists() and not path.is_file():
        raise OSError("not a file")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        _check_is_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError([Problem(path.name, "", "readable JSON", str(error))]) from error
    if not isinstance(value, dict):
        raise CheckpointError([Problem(path.name, "", "a JSON object", type(value).__name__)])
    return value
