"""What test_processes.py runs in processes of their own."""

import sys
from unittest import mock

from engine.harness import MTP, Worker, assert_outputs, cpu_worker, projections, quantize, set_model_parallel, stand_ins

# isort: split
import torch
import vllm


def run_rank(rank, path, rendezvous, truth):
    """One of two ranks loads its part of the model from the whole checkpoint."""
    torch.set_num_threads(1)
    tensor, pipeline = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
    with cpu_worker(rendezvous, rank, 2):
        for sizes, layers in (tensor, [0, 1]), (pipeline, [rank]):
            set_model_parallel(**sizes)
            for switch in ("0", "1"):
                model = Worker(path, switch, **sizes, distributed_executor_backend="mp").model
                assert list(projections(model)) == layers
                assert hasattr(model, "indexproj") == (switch == "1")
            assert_outputs(model, truth)
            torch.distributed.barrier()


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
        prompts = [{"prompt_token_ids": [3, 5, 7, 11]}, {"prompt_token_ids": [2] * 9}]
        seen.clear()
        parameters = vllm.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], list(seen)

    torch.set_num_threads(1)
    seen = []
    with (
        stand_ins(),
        mock.patch.object(CPUMLAImpl, "record_logical_topk_ready", create=True),
        mock.patch.object(SparseAttnIndexer, "forward_cpu", record),
        mock.patch.object(deepseek_v2.DeepseekV32IndexerCache, "get_kv_cache_spec", return_value=None),
        mock.patch.object(deepseek_v2, "per_token_group_quant_fp8", quantize),
    ):
        llm = vllm.LLM(
            path, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64, seed=0,
            max_num_batched_tokens=64, max_num_seqs=2, kv_cache_memory_bytes=2**26, speculative_config=MTP,
        )  # fmt: skip
        assert llm.apply_model(lambda model: hasattr(model, "indexproj")) == [True]
        before = tokens()
        assert before[1]
        llm.collective_rpc("reload_weights")
        assert tokens() == before


if __name__ == "__main__":
    generate(sys.argv[1])
