"""The only place that asks which device there is."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton

# Triton reads this when a kernel is defined; it cannot change later.
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Target:
    """A GPU, to dispatch and compilation.

    Attributes:
        arch: compute capability times ten (90 for sm_90) or gfx name ("gfx942").
        sm_count: streaming multiprocessors, or compute units.
    """

    backend: Literal["cuda", "hip"]
    arch: int | str
    sm_count: int

    @property
    def name(self) -> str:
        """The key in TARGETS."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    def is_cuda(self, capability: int = 0) -> bool:
        """True for an NVIDIA GPU of this compute capability (times ten) or newer."""
        return isinstance(self.arch, int) and self.arch >= capability


# The GPUs that `indexproj compile` covers, each in its largest common variant.
TARGETS = {
    "sm_80": Target("cuda", 80, sm_count=108),
    "sm_90": Target("cuda", 90, sm_count=132),
    "sm_100": Target("cuda", 100, sm_count=148),
    "sm_120": Target("cuda", 120, sm_count=188),
    "gfx942": Target("hip", "gfx942", sm_count=304),
    "gfx950": Target("hip", "gfx950", sm_count=256),
}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target behind a torch device.

    In Triton's interpreter it is always sm_90, so results there do not depend on the machine. Raises RuntimeError for a
    CPU device outside the interpreter, or a GPU older than sm_80.
    """
    if INTERPRETED:
        return TARGETS["sm_90"]
    if device.type != "cuda":
        raise RuntimeError(
            f"project: the Triton kernels need a GPU, and x is on {device}; move x and the weights to one, or set "
            "TRITON_INTERPRET=1 before Python starts to run the same kernels in Triton's interpreter"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        raise RuntimeError(f"project: {properties.name} is sm_{capability}; the kernels need sm_80 or newer (bf16)")
    return Target("cuda", capability, properties.multi_processor_count)
