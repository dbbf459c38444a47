"""The vLLM plugin. `register` is its entry point. Importing it imports neither vLLM nor the kernels."""

from .plugin import register as register
