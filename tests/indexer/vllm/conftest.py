"""The fixture of the fake vLLM."""

from fake_vllm import vllm  # noqa: F401
