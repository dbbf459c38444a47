import sys
from pathlib import Path

import pytest
import torch

import indexproj.benchmarks.gpu as gpu
from indexproj.kernels.tuned import versions

# `python -m pytest` would let transformers take the folder `kernels` for a package of that name; see tests/conftest.py.
sys.modules.setdefault("kernels", None)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="fewer sizes and rounds")


@pytest.fixture
def quick(request):
    return request.config.getoption("quick")


def pytest_generate_tests(metafunc):
    """m is QUICK_MS or MS of the suite."""
    if "m" in metafunc.fixturenames:
        module, is_quick = metafunc.module, metafunc.config.getoption("quick")
        metafunc.parametrize("m", module.QUICK_MS if is_quick else module.MS)


FAILED = set()


def pytest_runtest_logreport(report):
    if report.failed:
        FAILED.add(Path(report.fspath).name)


pytest_collectreport = pytest_runtest_logreport


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Adds the suites that failed, in part or as a whole; the others are measured all the same."""
    output_json["failed"] = sorted(FAILED)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {"versions": versions(), "gpu": gpu.description()}


@pytest.fixture
def one_thread():
    """As engines have it, which run one process per GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
