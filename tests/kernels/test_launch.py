"""What reaches the CUDA driver: Triton's real launcher on a driver that runs nothing."""

from unittest import mock

import pytest
import torch
import triton
from torch.nn.functional import linear
from triton.compiler import CompilationError

from indexproj.kernels import TARGETS, KernelConfig, ProjectionWeights, choose, project
from indexproj.kernels import launch as module
from indexproj.kernels.formats import parse_pair
from numerics import surrounded
from stub import stub_driver
from support import DEEPSEEK, GLM, weights

FP8, DENSE = "FP8 128x128, BF16", "BF16, BF16"
BF16, FP32 = torch.bfloat16, torch.float32
SPLIT = KernelConfig("split_k", block_m=16, block_k=64, split_k=6, slices=4, num_warps=4, num_stages=2)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with stub_driver(tmp_path_factory.mktemp("stub")) as stub:
        yield stub


@pytest.fixture(autouse=True)
def _no_plans():
    module.plan_of.cache_clear()


@pytest.fixture
def tuned(monkeypatch):
    """A table that prefers torch for BF16 with one output tensor, or what is put into it."""
    table = {(16, GLM, parse_pair(FP8)): (SPLIT, ()), (16, GLM, parse_pair(DENSE)): (SPLIT, ((BF16, BF16),))}
    monkeypatch.setattr(module, "table_of", lambda device: table)
    return table


@pytest.fixture
def products(monkeypatch):
    counter = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", counter)
    return counter


def x_of(m, k=DEEPSEEK[2]):
    return torch.zeros(m, k, dtype=BF16)


def grid_of(driver, *arguments, **options):
    before = driver.launches
    project(*arguments, **options)
    assert driver.launches == before + 1
    return driver.grid


def default_grid(m, w):
    return choose(m, w.shape, w.formats, TARGETS["sm_90"]).grid(m, *w.shape[:-1])


@pytest.mark.parametrize(("pair", "m"), [(FP8, 16), ("NVFP4, NVFP4", 100)])
def test_direct_launch_passes_what_tritons_launcher_passes(driver, pair, m):
    w, out, workspaces = weights(pair, DEEPSEEK), torch.empty(m, 192, dtype=BF16), set()
    for x in (x_of(m), x_of(m), x_of(m - 1)):  # compiled, kept, and another M of the same plan
        assert grid_of(driver, x, w, out=out[: len(x)]) == default_grid(len(x), w)
        own = (x, *w.wk.tensors, *w.gate.tensors, out, out[:, 128:])[:8]
        assert driver.pointers[: len(own)] == tuple(tensor.data_ptr() for tensor in own)
        workspaces.add(driver.pointers[len(own) :])
    assert module.plan_of.cache_info().currsize == len(workspaces) == 1


@pytest.mark.parametrize("side", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(driver, side):
    w, hook, chain = weights(FP8, DEEPSEEK), mock.Mock(), getattr(triton.knobs.runtime, side)
    chain.add(hook)
    try:
        for _ in range(2):
            project(x_of(16), w)
    finally:
        chain.remove(hook)
    assert [call.args[0].get()["name"] for call in hook.call_args_list] == ["split_k_kernel"] * 2


def test_kept_kernel_never_gets_unaligned_or_far_memory(driver, monkeypatch):
    w, x = weights(FP8, DEEPSEEK), x_of(16)
    far = torch.empty(15 * 2**25 + 7168, dtype=BF16).as_strided((16, 7168), (2**25, 1))  # never touched
    odd = {
        "stride of x": (torch.zeros(16, 7168 + 8, dtype=BF16)[:, :7168], w, None),
        "address of x": (x_of(17).view(-1)[1 : 16 * 7168 + 1].view(16, 7168), w, None),
        "reach of x": (far, w, None),
        "stride of out": (x, w, torch.empty(16, 200, dtype=BF16)[:, :192]),
        "address of out": (x, w, torch.empty(16, 208, dtype=BF16)[:, 1:193]),
        "address of weights": (x, surrounded(w, offset=1), None),
    }
    kept = mock.Mock(side_effect=AssertionError("the kept kernel ran"))
    monkeypatch.setattr(module.LaunchPlan, "_run_compiled", kept)
    for options in ({}, {"out": torch.empty(16, 192, dtype=BF16)}):
        project(x, w, **options)
        with pytest.raises(AssertionError, match="the kept kernel ran"):
            project(x, w, **options)
    for name, (own_x, own_w, out) in odd.items():
        assert grid_of(driver, own_x, own_w, out=out), name


def test_each_signature_and_bucket_has_its_own_plan(driver):
    w, x, other = weights(FP8, DEEPSEEK), x_of(16), weights("FP8 128x128, FP8 128x128", DEEPSEEK)
    options = [{"k_dtype": FP32}, {"gate_dtype": BF16}, {"gate_scale": 0.5}, {"batch_invariant": True}]
    calls = [(x, w, each) for each in ({}, *options, {"activation": "fp8"})]
    for number, (*arguments, named) in enumerate([*calls, (x_of(40), w, {}), (x.half(), w, {}), (x, other, {})], 1):
        project(*arguments, **named)
        assert module.plan_of.cache_info().currsize == number
    for m in range(9, 17):
        project(x_of(m), w)
    assert module.plan_of.cache_info().currsize == 9


def test_config_with_half_a_scale_group_of_x_does_not_compile(driver):
    w, outs = weights(FP8, DEEPSEEK), (torch.empty(16, 128, dtype=BF16), torch.empty(16, 64))
    signature = module.Signature.of(w.shape, w.formats, "fp8")
    with pytest.raises(CompilationError) as caught:
        module.launch(x_of(16), (w.wk.operands, w.gate.operands), outs, signature, KernelConfig("prefill", 16, 64))
    assert "static_assert" in str(caught.value.__cause__.__cause__.__cause__)


@pytest.mark.parametrize("gate_dtype", [FP32, BF16])
def test_launch_uses_the_tuned_config(driver, tuned, gate_dtype):
    w, x = weights(FP8, GLM), x_of(17, GLM[2])
    assert SPLIT.grid(16, 128, 32) != default_grid(16, w)
    for m in (9, 9, 16):
        assert grid_of(driver, x[:m], w, gate_dtype=gate_dtype) == SPLIT.grid(m, 128, 32)
    for m in (8, 17):  # other powers of two
        assert grid_of(driver, x[:m], w) == default_grid(m, w)
    for options in ({"batch_invariant": True}, {"activation": "fp8"}):
        assert grid_of(driver, x[:16], w, **options) == default_grid(16, w)
    assert grid_of(driver, x[:16].half(), w) == default_grid(16, w)
    assert grid_of(driver, x[:16], weights("NVFP4, NVFP4", GLM)) == default_grid(16, w)  # not measured


@pytest.mark.parametrize("row", [160, 200], ids=["contiguous", "row-strided"])
@pytest.mark.usefixtures("mm_to_fp32")
def test_torch_mm_runs_where_it_was_faster(driver, tuned, row, products):
    w, x = weights(DENSE, GLM), torch.randn(13, GLM[2]).bfloat16()
    out, before = torch.full((13, row), torch.nan, dtype=BF16)[:, :160], driver.launches
    k, gate = project(x, w, out=out)
    assert products.call_count == 1  # both in one GEMM, as in vLLM
    assert torch.equal(out, linear(x, w.fused_weight))
    assert torch.equal(torch.cat((k, gate), 1), out)
    tuned[16, GLM, parse_pair(DENSE)] = SPLIT, ((BF16, FP32),)
    assert torch.equal(project(x, w)[1], x.float() @ w.gate.values.float().T)
    inputs = x.requires_grad_(), [*w.wk.operands, *w.gate.operands], ["BF16", "BF16"]
    torch.ops.indexproj.project_out(*inputs, again := torch.empty_like(out), [1.0] * 2, ["none"] * 2, False)
    assert (products.call_count, driver.launches) == (4, before)
    assert torch.equal(again, out)


@pytest.mark.usefixtures("tuned")
def test_torch_mm_is_left_out(driver, products):
    """For outputs or weights apart, for gate_scale, as torch would round before it multiplies, and if not wanted."""
    w, x, out = weights(DENSE, GLM), x_of(13, GLM[2]), torch.empty(13, 160, dtype=BF16)
    apart = ProjectionWeights(w.wk.map(torch.clone), w.gate.map(torch.clone))
    calls = [(w, {"gate_dtype": BF16}), (apart, {"out": out}), (w, {"out": out, "gate_scale": 0.5})]
    for each, options in (*calls, *calls):
        assert grid_of(driver, x, each, **options) == SPLIT.grid(13, 128, 32)
    torch.use_deterministic_algorithms(True)
    try:
        grid_of(driver, x, w, out=out)
    finally:
        torch.use_deterministic_algorithms(False)
    config = KernelConfig("gemv", block_m=8, block_k=128, slices=8)
    signature = module.Signature.of(w.shape, w.formats, dtypes=(BF16, BF16))
    module.launch(x, (w.wk.operands, w.gate.operands), out.split((128, 32), 1), signature, config)
    assert driver.grid == config.grid(13, 128, 32)
    assert products.call_count == 0
    project(x, w, out=out)
    assert products.call_count == 1
