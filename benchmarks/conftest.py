import sys
from pathlib import Path

import pytest
import torch

from indexproj.benchmarks import gpu
from indexproj.kernels.dispatch import versions

# `python -m pytest` would let transformers take the folder `kernels` for a package of that name; see tests/conftest.py.
sys.modules.setdefault("kernels", None)
FAILED = set()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="fewer sizes and rounds")


@pytest.fixture
def quick(request):
    return request.config.getoption("quick")


def pytest_generate_tests(metafunc):
    """m takes the values of the suite's MS or QUICK_MS."""
    if "m" in metafunc.fixturenames:
        metafunc.parametrize(
            "m", metafunc.module.QUICK_MS if metafunc.config.getoption("quick") else metafunc.module.MS
        )


def pytest_runtest_logreport(report):
    if report.failed:
        FAILED.add(Path(report.fspath).name)


pytest_collectreport = pytest_runtest_logreport


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["failed"] = sorted(FAILED)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {"versions": versions(), "gpu": gpu.description()}


@pytest.fixture
def one_thread():
    """One torch thread, as in engines, which run one process per GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
