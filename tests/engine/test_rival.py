"""vLLM's own GEMM, compiled to stand beside our kernels."""

from indexproj.indexer.rival import block_scaled_gemm


def test_vllms_block_scaled_gemm_compiles_beside_ours():
    few, many = block_scaled_gemm("sm_90", (1, 65536))
    assert (few.programs, few.weight_reads, many.programs) == (1, 1, 1024)
    assert few.mma > 0
    assert 0 < few.registers <= 255
