"""Boots `LLM` with an MTP draft on a CPU, with the plugin from its entry point, and reloads it. For test_processes.py.

Stubs, for what a CPU lacks: the choice of a backend for sparse attention (the CPU's MLA backend attends to all
tokens, and gets a method that waits for the top-k), `indexer_op` (records sums of its inputs), the indexer's KV cache
(none), the quantization of the query (a Triton kernel), and the block-scaled FP8 GEMM (which needs AMX).
"""

import sys
from unittest import mock

from engine import harness  # before vLLM: sets the environment

# isort: split
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
from vllm.model_executor.models import deepseek_v2
from vllm.platforms import PlatformEnum
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from engine.test_fp8 import TorchKernel

SEEN = []


def record(self, hidden_states, q, k, weights):
    SEEN.append((k.double().sum() + weights.double().sum()).item())
    return self.topk_indices_buffer


def tokens(llm):
    prompts = [{"prompt_token_ids": [3, 5, 7, 11]}, {"prompt_token_ids": [2] * 9}]
    SEEN.clear()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], list(SEEN)


def main(path):
    torch.set_num_threads(1)
    with (
        harness.sparse_attention(),
        mock.patch.object(CPUMLAImpl, "record_logical_topk_ready", create=True),
        mock.patch.object(SparseAttnIndexer, "forward_cpu", record),
        mock.patch.object(deepseek_v2.DeepseekV32IndexerCache, "get_kv_cache_spec", return_value=None),
        mock.patch.object(deepseek_v2, "per_token_group_quant_fp8", harness.per_token_group_quant_fp8),
        mock.patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [TorchKernel]}),
    ):
        llm = LLM(
            path, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64, seed=0,
            max_num_batched_tokens=64, max_num_seqs=2, kv_cache_memory_bytes=2**26,
            speculative_config=harness.MTP,
        )  # fmt: skip
        found = llm.apply_model(lambda model: hasattr(model, "indexproj") and model.indexproj is not None)
        assert found == [True]
        before = tokens(llm)
        assert before[1]
        llm.collective_rpc("reload_weights")
        after = tokens(llm)
        assert after == before
        print("tokens", before[0])


if __name__ == "__main__":
    main(sys.argv[1])
