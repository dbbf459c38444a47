import gc
import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    from engine import harness

    @pytest.fixture(scope="session", autouse=True)
    def _worker():
        harness.show_log()
        gc.freeze()  # every load of vLLM collects garbage, 0.4 s among all that is imported by now
        with harness.cpu_worker():
            yield
