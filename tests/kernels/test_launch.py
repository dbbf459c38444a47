"""What reaches the CUDA driver: Triton's real launcher on a driver that runs nothing."""

from dataclasses import replace

import pytest
import torch
import triton
from triton.compiler import CompilationError

from indexproj.kernels import TARGETS, KernelConfig, choose, project
from indexproj.kernels import launch as module
from stub import stub_driver
from support import ALL_PAIRS, DEEPSEEK, weights

SM90 = TARGETS["sm_90"]
FP8 = "FP8 128x128, BF16"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with stub_driver(tmp_path_factory.mktemp("stub")) as stub:
        yield stub


@pytest.fixture(autouse=True)
def _no_plans():
    module.plan_of.cache_clear()


def x_of(m, k=DEEPSEEK[2]):
    return torch.zeros(m, k, dtype=torch.bfloat16)


@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_projection_is_one_launch(driver, pair):
    w = weights(pair, (128, 16, 512))
    for m in (2, 16, 100):
        for _ in range(2):
            before = driver.launches
            project(x_of(m, 512), w)
            assert driver.launches == before + 1
            assert driver.grid == choose(m, w.shape, w.formats, SM90).grid(m, 128, 16)


def test_zero_rows_launch_nothing(driver):
    before = driver.launches
    project(x_of(0), weights("BF16, BF16", DEEPSEEK))
    assert driver.launches == before


@pytest.mark.parametrize("m", [16, 64])
def test_direct_launch_passes_what_tritons_launcher_passes(driver, m):
    w = weights(FP8, DEEPSEEK)
    out = torch.empty(m, 192, dtype=torch.bfloat16)
    workspaces = set()
    for x in (x_of(m), x_of(m), x_of(m - 1)):  # compiled, kept, and another M of the same plan
        project(x, w, out=out[: len(x)])
        assert driver.grid == choose(m, w.shape, w.formats, SM90).grid(len(x), 128, 64)
        own = (x, *w.wk.tensors, w.gate.weight, out, out[:, 128:])
        assert driver.pointers[:6] == tuple(tensor.data_ptr() for tensor in own)
        workspaces.add(driver.pointers[6:])
    assert module.plan_of.cache_info().currsize == len(workspaces) == 1


@pytest.mark.parametrize("side", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(driver, side):
    w, seen = weights(FP8, DEEPSEEK), []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    getattr(triton.knobs.runtime, side).add(hook)
    try:
        for _ in range(2):
            project(x_of(16), w)
    finally:
        getattr(triton.knobs.runtime, side).remove(hook)
    assert seen == ["split_k_kernel"] * 2


def test_kept_kernel_never_gets_unaligned_or_far_memory(driver, monkeypatch):
    class Never:
        @property
        def run(self):
            raise AssertionError("the kept kernel ran")

    w = weights(FP8, DEEPSEEK)
    around = torch.zeros(16, DEEPSEEK[2] + 8, dtype=torch.bfloat16)
    far = torch.empty(15 * 2**25 + 7168, dtype=torch.bfloat16).as_strided((16, 7168), (2**25, 1))  # never touched
    odd = {
        "stride of x": lambda: project(around[:, : DEEPSEEK[2]], w),
        "address of x": lambda: project(torch.zeros(16 * 7168 + 1, dtype=torch.bfloat16)[1:].view(16, 7168), w),
        "reach of x": lambda: project(far, w),
        "stride of out": lambda: project(x_of(16), w, out=torch.empty(16, 200, dtype=torch.bfloat16)[:, :192]),
        "address of out": lambda: project(x_of(16), w, out=torch.empty(16, 208, dtype=torch.bfloat16)[:, 1:193]),
        "address of weights": lambda: project(x_of(16), shifted(w)),
    }
    original = module.Plan._run_compiled
    monkeypatch.setattr(
        module.Plan, "_run_compiled", lambda self, *args: setattr(self, "_compiled", Never()) or original(self, *args)
    )
    for options in ({}, {"out": torch.empty(16, 192, dtype=torch.bfloat16)}):
        project(x_of(16), w, **options)
        with pytest.raises(AssertionError, match="the kept kernel ran"):
            project(x_of(16), w, **options)
    for name, run in odd.items():
        launches = driver.launches
        run()
        assert driver.launches == launches + 1, name


def shifted(w):
    """The same weights with every tensor one byte or more off."""
    return w.map(lambda t: torch.cat((t.view(-1)[:1].view(torch.uint8), t.view(-1).view(torch.uint8))).view(t.dtype)[1:]
                 .view(t.shape))  # fmt: skip


def test_each_signature_and_bucket_has_its_own_plan(driver):
    w = weights(FP8, DEEPSEEK)
    project(x_of(16), w)
    for number, options in enumerate(
        (
            {"k_dtype": torch.float32},
            {"gate_dtype": torch.bfloat16},
            {"gate_scale": 0.5},
            {"batch_invariant": True},
            {"activation": "fp8"},
        ),
        2,
    ):
        project(x_of(16), w, **options)
        assert module.plan_of.cache_info().currsize == number
    project(x_of(40), w)
    project(x_of(16).half(), w)
    project(x_of(16), weights("FP8 128x128, FP8 128x128", DEEPSEEK))
    assert module.plan_of.cache_info().currsize == 9
    for m in range(9, 17):
        project(x_of(m), w)
    assert module.plan_of.cache_info().currsize == 9


def test_config_with_half_a_scale_group_of_x_does_not_compile(driver):
    w, outs = weights(FP8, DEEPSEEK), (torch.empty(16, 128, dtype=torch.bfloat16), torch.empty(16, 64))
    signature = replace(module.signature_of(w, torch.bfloat16, torch.float32), activations=("fp8", None))
    with pytest.raises(CompilationError) as caught:
        module.launch(x_of(16), (w.wk.operands, w.gate.operands), outs, signature, KernelConfig("prefill", 16, 64))
    assert "static_assert" in str(caught.value.__cause__.__cause__.__cause__)
