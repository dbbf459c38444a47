"""Triton's real CUDA launcher on a driver that runs nothing: host code, tested and timed without a GPU."""

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import triton
from triton.backends.nvidia import driver as nvidia

from indexproj.kernels import TARGETS, launch


class Stub:
    """What the driver was last asked for; pointers are the first eight arguments."""

    def __init__(self, library):
        self._library = library

    launches = property(lambda self: ctypes.c_int.in_dll(self._library, "launches").value)
    grid = property(lambda self: tuple((ctypes.c_uint * 3).in_dll(self._library, "last_config")))
    pointers = property(lambda self: tuple((ctypes.c_uint64 * 8).in_dll(self._library, "last_pointers")))


@functools.cache
def _library():
    """(directory, library) of the driver: one per process, as Triton's launchers stay bound to the first."""
    directory = tempfile.TemporaryDirectory()
    path, source = Path(directory.name) / "libcuda.so.1", Path(__file__).with_name("stub.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", path, source], check=True)
    return directory, ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _driver():
    nvidia.library_dirs.cache_clear()
    driver = nvidia.CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _: 0
    driver.get_device_capability = lambda _: (9, 0)
    return driver


@contextlib.contextmanager
def stub_driver(cache, target=TARGETS["sm_90"]):
    """Triton with an H100 that runs nothing, and a directory to keep kernels in; yields the Stub.

    Tensors stay on the CPU. Triton's launcher, and what it is compiled from, are the real ones.
    """
    directory, library = _library()
    with (
        mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": directory.name, "TRITON_CACHE_DIR": str(cache)}),
        mock.patch.object(launch, "target_of", return_value=target),
        mock.patch.object(launch, "plan_of", functools.cache(launch.plan_of.__wrapped__)),
        mock.patch.object(triton.runtime.driver, "_active", _driver()),
    ):
        yield Stub(library)
