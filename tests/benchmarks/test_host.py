"""`make benchmark`, with two layers."""

import shutil

import pytest
import torch

import host


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the stub driver")
def test_host_and_loading(capsys):
    threads = torch.get_num_threads()
    _, *results = host.run(layers=2)
    torch.set_num_threads(threads)
    names = ["JITFunction", "launch", "torch.library op", "project"]
    loaders = ["ours, which keeps FP8", "streaming and upcasting", "ours, headers only"]
    assert [each["contender"] for each in results] == names * 2 + loaders
    us = {(each["contender"], each.get("m")): min(each["us"]) for each in results}
    assert us["launch", 1] < us["JITFunction", 1]
    assert "ours, which keeps FP8: 3.7 MB of weights" in capsys.readouterr().out
