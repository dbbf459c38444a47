"""What reaches the CUDA driver, with Triton's real launcher on a driver that runs nothing."""

import pytest
import torch
import triton
from triton.compiler import CompilationError

from indexproj.benchmarks.stub import stub_driver
from indexproj.kernels import TARGETS, KernelConfig, choose, project
from indexproj.kernels import launch as module
from indexproj.kernels.matrix import Kind
from support import DEEPSEEK, PAIRS, weights

SM90 = TARGETS["sm_90"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with stub_driver(tmp_path_factory.mktemp("stub")) as stub:
        yield stub


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(module, "_ready", {})


def x_of(m, k=DEEPSEEK[2]):
    return torch.zeros(m, k, dtype=torch.bfloat16)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_projection_is_one_launch(driver, pair):
    w = weights(pair, (128, 16, 512))
    for m in (2, 16, 100):
        for _ in range(2):
            before = driver.launches
            project(x_of(m, 512), w)
            assert driver.launches == before + 1
            assert driver.grid == choose(m, w.shape, w.kinds, SM90).grid(m, 128, 16)


def test_no_rows_no_launch(driver):
    before = driver.launches
    project(x_of(0), weights("dense-dense", DEEPSEEK))
    assert driver.launches == before


@pytest.mark.parametrize("m", [16, 64])
def test_the_short_way_hands_over_what_tritons_launcher_does(driver, m):
    w = weights("fp8-dense", DEEPSEEK)
    out = torch.empty(m, 192, dtype=torch.bfloat16)
    seen = []
    for x in (x_of(m), x_of(m), x_of(m - 1)):  # compiled, taken from the dictionary, and another M of the same kernel
        project(x, w, out=out[: len(x)])
        assert driver.grid == choose(m, w.shape, w.kinds, SM90).grid(len(x), 128, 64)
        own = (x, *w.wk.tensors, w.gate.weight, out, out[:, 128:])
        assert driver.pointers[:6] == tuple(tensor.data_ptr() for tensor in own)
        seen.append(driver.pointers[6:])
    assert len({id(compiled) for compiled, *_ in module._ready.values()}) == 1
    assert len(set(seen)) == 1  # one workspace


@pytest.mark.parametrize("side", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(driver, side):
    w, seen = weights("fp8-dense", DEEPSEEK), []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    getattr(triton.knobs.runtime, side).add(hook)
    try:
        for _ in range(2):  # compiled, and taken from the dictionary
            project(x_of(16), w)
    finally:
        getattr(triton.knobs.runtime, side).remove(hook)
    assert seen == ["split_k_kernel"] * 2


def test_a_kernel_compiled_for_usual_memory_is_never_given_other_memory(driver):
    class Never:
        @property
        def run(self):
            raise AssertionError("the compiled kernel was taken")

    w = weights("fp8-dense", DEEPSEEK)
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
    for options in ({}, {"out": torch.empty(16, 192, dtype=torch.bfloat16)}):
        project(x_of(16), w, **options)
    assert len(module._ready) == 2
    for key, (_, *rest) in module._ready.items():
        module._ready[key] = Never(), *rest
    with pytest.raises(AssertionError, match="was taken"):
        project(x_of(16), w)
    before = dict(module._ready)
    for name, run in odd.items():
        launches = driver.launches
        run()
        assert driver.launches == launches + 1, name
        assert module._ready == before, name


def shifted(w):
    """The same weights, every tensor one element off."""
    return w.map(lambda t: torch.cat((t.view(-1)[:1].view(torch.uint8), t.view(-1).view(torch.uint8))).view(t.dtype)[1:]
                 .view(t.shape))  # fmt: skip


def test_what_is_kept_of_launches_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(module, "MAX_READY", 3)
    w, before = weights("fp8-dense", DEEPSEEK), driver.launches
    for m in range(9, 17):
        project(x_of(m), w)
        assert len(module._ready) <= 3
    assert driver.launches == before + 8


def test_what_a_kernel_depends_on_gets_its_own(driver):
    w = weights("fp8-dense", DEEPSEEK)
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
        assert len(module._ready) == number
    project(x_of(40), w)
    project(x_of(16).half(), w)
    project(x_of(16), weights("fp8-fp8", DEEPSEEK))
    assert len(module._ready) == 9


def test_a_config_that_rounds_x_in_other_groups_does_not_compile(driver):
    w, outs = weights("fp8-dense", DEEPSEEK), (torch.empty(16, 128, dtype=torch.bfloat16), torch.empty(16, 64))
    problem = module.problem_of(w, torch.bfloat16, torch.float32)._replace(kinds=(Kind.W8A8, Kind.BF16))
    with pytest.raises(CompilationError) as caught:
        module.launch(x_of(16), (w.wk.operands, w.gate.operands), outs, problem, KernelConfig("tiled", 16, 64))
    assert "static_assert" in str(caught.value.__cause__.__cause__)
