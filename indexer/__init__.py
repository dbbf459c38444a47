"""The projection as an nn.Module, the vLLM plugin and the command line.

IndexerProjection is imported on first use: `verify` must choose between GPU and interpreter before Triton is imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .module import IndexerProjection as IndexerProjection


def __getattr__(name: str) -> Any:
    if name == "IndexerProjection":
        from .module import IndexerProjection

        return IndexerProjection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
