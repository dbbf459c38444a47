"""The whole of vLLM: LLM, the plugin from its entry point, generation and a reload by RPC, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.test_fp8 import fp8_checkpoint

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("draft", ["main", "mtp"])
def test_generation_is_the_same_after_reload(tmp_path, draft):
    path, _ = fp8_checkpoint(tmp_path / "checkpoint", heads=4, kv_rank=512)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "VLLM_PLUGINS": "indexproj",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the stubs are in this process
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    command = [sys.executable, "-m", "engine.generate", path, draft]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert "runs 2 indexer projections of" in output
    assert ("runs 1 indexer projections of DeepSeekMTP" in output) == (draft == "mtp")
