"""The changed forward of GLM-5.3-Flash's indexer."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

GLM5NEXT = "vllm.models.glm5next.common.attention.Indexer"
TWO_GEMMS = """
kw, _ = self.wk_weights_proj(hidden_states)
k = kw[:, :self.head_dim]
if self._wp_fp32 is None:
    self._wp_fp32 = self.wk_weights_proj.weight.data[self.head_dim:, :].t().contiguous().float()
weights = torch.mm(hidden_states.float(), self._wp_fp32)
"""
ONE_LAUNCH = "k, weights = self.wk_weights_proj.quant_method.k_and_gate(self.wk_weights_proj, hidden_states)"


class UnexpectedError(Exception):
    """Something in vLLM differs from what the patches were written for."""


@functools.cache
def glm5next_forward(indexer_class: Any) -> Any:
    """Compiles a replacement for `Indexer.forward`: the same with ONE_LAUNCH in place of TWO_GEMMS.

    vLLM computes the gate a second time, in fp32, from a copy of its weights in `_wp_fp32` that no reload renews.

    Raises:
        UnexpectedError: the function does not have TWO_GEMMS.
        OSError: its source is missing.
    """
    original, names = indexer_class.forward, {}
    source = one_launch(textwrap.dedent(inspect.getsource(original)))
    exec(compile(source, "<string>", "exec"), original.__globals__, names)  # vLLM warns of other names that are no file
    return names["forward"]


def one_launch(source: str) -> str:
    """Replaces TWO_GEMMS by ONE_LAUNCH in the source of a function. Raises UnexpectedError if it does not have them."""
    found, wanted = (ast.unparse(ast.parse(text)) + "\n" for text in (source, TWO_GEMMS))
    statements = textwrap.indent(wanted, "    ")
    if statements not in found:
        raise UnexpectedError(f"{GLM5NEXT}.forward: expected the statements\n{wanted}")
    return found.replace(statements, f"    {ONE_LAUNCH}\n")
