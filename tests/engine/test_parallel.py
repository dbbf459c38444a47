"""The plugin in several processes: ranks that are spawned, a worker that is forked, and vLLM's own entry points."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from engine.checkpoints import FP8, checkpoint, write
from engine.ranks import run_rank

TESTS = Path(__file__).parent.parent


def test_tensor_and_pipeline_parallel(tmp_path):
    """Two processes with a gloo group, like vLLM's ranks on a CPU."""
    tensors, truth = checkpoint(FP8)
    path = write(tmp_path / "checkpoint", tensors)
    torch.multiprocessing.spawn(run_rank, (path, f"{tmp_path}/rendezvous", truth), nprocs=2)


ENTRY_POINT = """
import os, sys
os.environ.pop("VLLM_PLUGINS")
import vllm.plugins
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

stock = BaseModelLoader.create_model
for switch in ("0", "1", "bf16"):
    os.environ["INDEXPROJ_VLLM"] = switch
    BaseModelLoader.create_model = stock
    for _ in range(2):
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
    patched = BaseModelLoader.create_model
    assert hasattr(patched, "is_indexproj") == (switch != "0")
    assert patched is stock or patched.__wrapped__ is stock

from indexproj.indexer.vllm import plugin as vllm_plugin
assert sys.modules.keys().isdisjoint(("indexproj.kernels", *vllm_plugin.MODEL_FILES))

from pathlib import Path
import torch
torch.set_num_threads(1)
from engine import checkpoints, harness

path = checkpoints.write(Path(sys.argv[1]), checkpoints.deepseek())
with harness.cpu_worker(), harness.plugin("1"):
    patched = BaseModelLoader.create_model
    model = harness.build(path)
    assert hasattr(model, "indexproj")
    module = harness.projections(model)[0]
    x = torch.ones(3, checkpoints.K).bfloat16()
    expected = module(x)[0]
    child = os.fork()
    if child == 0:
        vllm_plugin.register()
        same = BaseModelLoader.create_model is patched and torch.equal(module(x)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_entry_point_and_fork(tmp_path):
    """vLLM finds the plugin, again and again, without importing a model or a kernel; and a forked worker computes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", ENTRY_POINT, tmp_path / "checkpoint"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
