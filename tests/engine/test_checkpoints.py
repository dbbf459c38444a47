"""DeepseekV3ForCausalLM, loaded by vLLM's own loader from checkpoints in every encoding."""

import re
from pathlib import Path

import pytest
import torch

from engine.checkpoints import D, H, K, M
from engine.harness import activations, assert_outputs, like, projections
from engine.report import CASES, outcomes

PAGE = (Path(__file__).parent.parent.parent / "docs/vllm.md").read_text()
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_encoding_matches_documented_table(tmp_path, case):
    """The plugin loads exact values or refuses, and vLLM's forward of the module computes with them."""
    stock, swapped, model, truth = outcomes(case, tmp_path)
    assert f"{stock} | {swapped}" == DOCUMENTED[case.name]
    assert swapped.startswith("right, ") if case.loads else swapped == "refused"
    if not case.loads:
        return
    assert_outputs(model, truth)
    for layer, module in projections(model).items():
        output, bias = module(activations()[0])
        assert bias is None
        assert like(output) == (torch.bfloat16, (M, D + H), (D + H, 1))
        # Other code in vLLM finds `.weight` if it can hold the values.
        is_dense = sum(tensor.nbytes for tensor in module.parameters()) == 2 * (D + H) * K
        assert hasattr(module, "weight") == is_dense
        if is_dense:
            assert torch.equal(module.weight.double(), truth[layer])
