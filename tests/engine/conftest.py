import gc
import importlib.util
import logging

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    from engine import harness

    # isort: split
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    @pytest.fixture(scope="session", autouse=True)
    def _worker(tmp_path_factory):
        configure_logging(LoggingConfig())  # or the first config that is created does, and undoes the next line
        logging.getLogger("vllm").propagate = True  # to pytest
        gc.freeze()  # every load of vLLM collects garbage, 0.4 s among all that is imported by now
        with harness.cpu_worker(tmp_path_factory.mktemp("worker") / "rendezvous"):
            yield
