"""The plugin in several processes: ranks that are spawned, and vLLM's own entry points."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from engine.checkpoints import FP8, checkpoint, fp8_checkpoint, write
from engine.processes import run_rank


def run(*arguments, cwd, **environment):
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": "indexproj", **environment}
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

from indexproj.indexer.vllm import plugin
assert sys.modules.keys().isdisjoint(("indexproj.kernels", *plugin.MODEL_FILES))
"""


def test_entry_point(tmp_path):
    """vLLM finds the plugin, again and again, without importing a model or a kernel."""
    run("-c", ENTRY_POINT, cwd=tmp_path)


def test_generation_is_the_same_after_reload(tmp_path):
    """The whole of vLLM: LLM with a draft, the plugin from its entry point, generation and a reload by RPC."""
    path, _ = fp8_checkpoint(tmp_path / "checkpoint")
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the stand-ins are in this process
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    output = run("-m", "engine.processes", path, cwd=tmp_path, **environment)
    assert "runs 2 indexer projections of DeepseekV3ForCausalLM" in output
    assert "runs 1 indexer projections of DeepSeekMTP" in output
