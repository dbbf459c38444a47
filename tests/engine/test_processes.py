"""The plugin in several processes: ranks that are spawned, a worker that is forked, and vLLM's own entry points."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from engine.checkpoints import FP8, checkpoint, write
from engine.harness import run_rank
from engine.test_fp8 import fp8_checkpoint

TESTS = Path(__file__).parent.parent


def run(*arguments, cwd, **environment):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    return output


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
    run("-c", ENTRY_POINT, tmp_path / "checkpoint", cwd=tmp_path)


def test_generation_is_the_same_after_reload(tmp_path):
    """The whole of vLLM: LLM with a draft, the plugin from its entry point, generation and a reload by RPC."""
    path, _ = fp8_checkpoint(tmp_path / "checkpoint")
    environment = {
        "VLLM_PLUGINS": "indexproj",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the stubs are in this process
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    output = run("-m", "engine.generate", path, cwd=tmp_path, **environment)
    assert "runs 2 indexer projections of DeepseekV3ForCausalLM" in output
    assert "runs 1 indexer projections of DeepSeekMTP" in output
