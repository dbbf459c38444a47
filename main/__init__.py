"""The indexer projection of DeepSeek Sparse Attention: Triton kernels, a checkpoint loader and a vLLM plugin."""

from importlib.metadata import version

__version__ = version("indexproj")
