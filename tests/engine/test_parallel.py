"""Two processes with a gloo group, as vLLM's ranks on a CPU; and the plugin in processes that are spawned or forked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.harness import deepseek, with_projection, write
from engine.kinds import FP8, exports_of
from engine.ranks import run_rank

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"tensor_parallel_size": 2}, ([0, 1], [0, 1])),
        ({"pipeline_parallel_size": 2}, ([0], [1])),
    ],
    ids=["tp", "pp"],
)
def test_two_ranks(tmp_path, arguments, layers):
    truth = {}
    path = write(tmp_path / "checkpoint", with_projection(deepseek(), exports_of(FP8, truth)))
    arguments = {**arguments, "distributed_executor_backend": "mp"}
    torch.multiprocessing.spawn(run_rank, (path, f"{tmp_path}/rendezvous", truth, arguments, layers), nprocs=2)


FORKED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from engine import harness
from indexproj.indexer.vllm import plugin as vllm_plugin

path = harness.write(Path(sys.argv[1]), harness.deepseek())
with harness.cpu_worker(), harness.plugin("1"):
    patched = harness.BaseModelLoader.create_model
    module = harness.projections(harness.build(path))[0]
    x = torch.ones(3, harness.K).bfloat16()
    expected = module(x)[0]
    child = os.fork()
    if child == 0:
        vllm_plugin.register()
        same = harness.BaseModelLoader.create_model is patched and torch.equal(module(x)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_worker(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run([sys.executable, "-c", FORKED, tmp_path / "checkpoint"], check=True, env=environment, cwd=tmp_path)


ENTRY_POINT = """
from vllm.plugins import load_general_plugins
import vllm.plugins
load_general_plugins()
vllm.plugins.plugins_loaded = False
load_general_plugins()
import sys
from indexproj.indexer.vllm.plugin import MODEL_FILES
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
patched = BaseModelLoader.create_model
print(hasattr(patched, "is_indexproj") and not hasattr(patched.__wrapped__, "is_indexproj"))
print(not sys.modules.keys().isdisjoint(("indexproj.kernels", *MODEL_FILES)))
"""


@pytest.mark.parametrize(("switch", "is_patched"), [("1", True), ("bf16", True), ("0", False)])
def test_vllm_finds_the_plugin(tmp_path, switch, is_patched):
    """By its entry point, in a process of its own; twice; and neither a model nor a kernel is imported by that."""
    environment = {**os.environ, "INDEXPROJ_VLLM": switch}
    del environment["VLLM_PLUGINS"]
    command = [sys.executable, "-c", ENTRY_POINT]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-2:] == [str(is_patched), "False"], result.stderr
