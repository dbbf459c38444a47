"""The plugin in several processes: ranks that are spawned, and vLLM's own entry points."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from engine.checkpoints import FP8, checkpoint, fp8_checkpoint, write
from engine.harness import MTP, Worker, assert_outputs, cpu_worker, projections, quantize, set_model_parallel, stand_ins

# isort: split
import torch
import vllm


def run(*arguments, cwd, **environment):
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": "indexproj", **environment}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    return output


def run_rank(rank, path, rendezvous, truth):
    """One of two ranks loads its part of the model from the whole checkpoint."""
    torch.set_num_threads(1)
    with cpu_worker(rendezvous, rank, 2):
        for sizes, layers in ({"tensor_parallel_size": 2}, [0, 1]), ({"pipeline_parallel_size": 2}, [rank]):
            set_model_parallel(**sizes)
            model = Worker(path, **sizes, distributed_executor_backend="mp").model
            assert list(projections(model)) == list(model.indexproj.layers) == layers
            assert_outputs(model, truth)
            torch.distributed.barrier()


def test_tensor_and_pipeline_parallel(tmp_path):
    """Two processes with a gloo group, like vLLM's ranks on a CPU."""
    tensors, truth = checkpoint(FP8)
    path = write(tmp_path / "checkpoint", tensors)
    from engine import test_processes  # by a name that the processes can import

    torch.multiprocessing.spawn(test_processes.run_rank, (path, f"{tmp_path}/rendezvous", truth), nprocs=2)


ENTRY_POINT = """
import os, sys
import vllm.plugins
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

stock = BaseModelLoader.create_model
for switch in ("0", "1", "1"):
    os.environ["INDEXPROJ_VLLM"] = switch
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    wrapped = getattr(BaseModelLoader.create_model, "__wrapped__", None)
    assert wrapped is (stock if switch == "1" else None), switch

from indexproj.indexer.vllm.plugin import MODEL_FILES
assert sys.modules.keys().isdisjoint(("indexproj.kernels", *MODEL_FILES))
"""


def test_entry_point(tmp_path):
    """vLLM finds the plugin, again and again, without importing a model or a kernel."""
    run("-c", ENTRY_POINT, cwd=tmp_path)


def generate(path):
    """Boots `LLM` with an MTP draft, with the plugin from its entry point, and reloads it.

    More stand-ins: a method of the MLA backend that waits for the top-k, `indexer_op` (records sums of its inputs), the
    indexer's KV cache (none), and the quantization of the query (a Triton kernel).
    """
    from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
    from vllm.model_executor.models import deepseek_v2
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    def record(self, hidden_states, q, k, weights):
        seen.append((k.double().sum() + weights.double().sum()).item())
        return self.topk_indices_buffer

    def tokens():
        seen.clear()
        prompts = [{"prompt_token_ids": [3, 5, 7, 11]}, {"prompt_token_ids": [2] * 9}]
        outputs = llm.generate(prompts, vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=3))
        return [output.outputs[0].token_ids for output in outputs], list(seen)

    torch.set_num_threads(1)
    seen = []  # by record
    with (
        stand_ins(),
        mock.patch.object(CPUMLAImpl, "record_logical_topk_ready", create=True),
        mock.patch.object(SparseAttnIndexer, "forward_cpu", record),
        mock.patch.object(deepseek_v2.DeepseekV32IndexerCache, "get_kv_cache_spec", return_value=None),
        mock.patch.object(deepseek_v2, "per_token_group_quant_fp8", quantize),
    ):
        llm = vllm.LLM(
            path, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_batched_tokens=64,
            max_num_seqs=2, kv_cache_memory_bytes=2**26, speculative_config=MTP,
        )  # fmt: skip
        assert llm.apply_model(lambda model: hasattr(model, "indexproj")) == [True]
        before = tokens()
        assert before[1]
        llm.collective_rpc("reload_weights")
        assert tokens() == before


def test_generation_is_the_same_after_reload(tmp_path):
    """The whole of vLLM: LLM with a draft, the plugin from its entry point, generation and a reload by RPC."""
    path, _ = fp8_checkpoint(tmp_path / "checkpoint")
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # with stand-ins
    output = run("-m", "engine.test_processes", path, cwd=tmp_path, VLLM_LOGGING_LEVEL="INFO", **one_process)
    assert "runs 2 indexer projections of DeepseekV3ForCausalLM" in output
    assert "runs 1 indexer projections of DeepSeekMTP" in output


if __name__ == "__main__":
    generate(sys.argv[1])
