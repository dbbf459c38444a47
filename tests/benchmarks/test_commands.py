"""compile, tune and bench: help, docs, and errors that need neither compiler nor GPU; `make benchmark`."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import host
from indexproj.__main__ import app
from indexproj.indexer.models import PAIRS, SHAPES
from support import invoke

SM_90 = ("compile", "--target", "sm_90")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile",), "expected either --target or --all"),
        ((*SM_90, "--all"), "expected either --target or --all"),
        (("compile", "--target", "sm_70"), "--target must be one of sm_80; sm_90; sm_100; sm_120; gfx942; gfx950"),
        ((*SM_90, "--shape", "glm"), "--shape must be one of deepseek-v3.2; glm-5; deepseek-v4-pro; deepseek-v4-flash"),
        ((*SM_90, "--pair", "INT4, BF16"), "each format in a --pair such as 'FP8 128x128, BF16' must be one of BF16; "),
        ((*SM_90, "--pair", "BF16, BF16", "--shape", "deepseek-v4-pro"), "no --pair has as many formats as a --shape"),
        ((*SM_90, "--activation", "fp8"), "--activation needs wk in FP8 128x128"),
        ((*SM_90, "--cache", __file__), "compile: [Errno 17] File exists"),
        (("compile", "--all", "--sm-count", "78"), "--sm-count needs exactly one --target, got sm_80, sm_90, sm_100"),
        ((*SM_90, "--sm-count", "0"), "Invalid value for '--sm-count'"),
        (SM_90, "compile: TRITON_INTERPRET=1 is set"),
        (("bench", "--minutes", -1), "Invalid value for '--minutes'"),
        (("bench", "--minutes", 10**7), "Invalid value for '--minutes'"),
        (("tune", "--seconds", -1), "Invalid value for '--seconds'"),
        (("tune", "--seconds", 10**7), "Invalid value for '--seconds'"),
    ],
)
def test_bad_input_exits_with_2(arguments, message, monkeypatch):
    monkeypatch.setattr("indexproj.benchmarks.compiled.INTERPRETED", True)
    assert message in invoke(*arguments, code=2).stderr


DOCS = [(Path(__file__).parents[2] / name).read_text() for name in ("README.md", "docs/benchmarks.md")]
COMMAND = r"(?:^|`)(indexproj (?:bench|tune|compile|report) [^`\n]+)"


@pytest.mark.parametrize("line", re.findall(COMMAND, "\n".join(DOCS), re.MULTILINE))
def test_commands_in_docs_parse(line):
    _, name, *arguments = shlex.split(line)
    parameters = get_command(app).commands[name].make_context(name, arguments).params
    assert set(parameters.get("pair") or ()) <= set(PAIRS)
    assert set(parameters.get("shape") or ()) <= SHAPES.keys()


@pytest.mark.parametrize("command", ["bench", "compile", "tune"])
def test_help_lists_shapes_and_pairs(command):
    text = " ".join(invoke(command, "--help").stdout.split())
    assert "; ".join(PAIRS) in text
    assert "deepseek-v3.2 (N=128+64, K=7168); glm-5 (N=128+32, K=6144); deepseek-v4-pro (N=2048+64+512, K=" in text


def test_compile_faults_exit_with_1(monkeypatch):
    facts = {"target": "sm_90", "shape": "glm-5", "pair": "BF16, BF16", "activation": None, "gate": "fp32", "m": 4}
    numbers = ("bytes", "reduced_bytes", "step", "load_groups", "estimate_us", "registers", "shared_memory")
    row = facts | dict.fromkeys(numbers, 255)
    rows = [row | {"kernel": "gemv", "faults": []}, row | {"kernel": "prefill", "faults": ["2 spills"]}]
    monkeypatch.setattr("indexproj.benchmarks.compiled.rows", lambda *_: rows)
    result = invoke(*SM_90, code=1)
    assert result.stderr.endswith("BF16, BF16, gate in fp32, prefill, M = 4: 2 spills\n")
    assert [line.strip("│ ").split()[-1] for line in result.stdout.splitlines() if " 255 " in line] == ["ok", "failed"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the stub driver")
def test_host_and_loading(capsys):
    threads = torch.get_num_threads()
    _, *results = host.run(layers=2)
    torch.set_num_threads(threads)
    names = ["JITFunction", "launch", "torch.library op", "project"]
    loaders = ["ours, which keeps FP8", "streaming and upcasting", "ours, headers only"]
    assert [each["contender"] for each in results] == names * 2 + loaders
    us = {(each["contender"], each.get("m")): min(each["us"]) for each in results}
    assert us["launch", 1] < us["JITFunction", 1]
    assert "ours, which keeps FP8: 3.7 MB of weights" in capsys.readouterr().out
