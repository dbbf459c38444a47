"""Triton's real CUDA launcher on a driver that runs nothing: host code, tested and timed without a GPU."""

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path
from unittest import mock

import triton
from triton.backends.nvidia import driver as nvidia

from indexproj.kernels import TARGETS, launch

SOURCE = Path(__file__).with_name("cuda_stub.c")


@contextlib.contextmanager
def stub_driver(directory):
    """Triton with an H100 that only counts launches; yields the stub, a ctypes library.

    Tensors stay on the CPU. Triton's launcher, and what it is compiled from, are the real ones.
    """
    library = Path(directory) / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE], check=True
    )
    stub = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    before = triton.runtime.driver._active
    with (
        mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(directory), "TRITON_CACHE_DIR": f"{directory}/cache"}),
        mock.patch.object(launch, "target_of", return_value=TARGETS["sm_90"]),
    ):
        nvidia.library_dirs.cache_clear()
        driver = nvidia.CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda _: 0
        driver.get_device_capability = lambda _: (9, 0)
        triton.runtime.driver.set_active(driver)
        try:
            yield stub
        finally:
            triton.runtime.driver._active = before
