"""What a kernel is compiled for.

It is decided before lowering: an instruction that a GPU lacks can abort the whole process in the compiler, where
no exception handler helps.
"""

import dataclasses
from typing import Literal

from jax.extend.backend import get_default_device

Instruction = Literal["mma", "wgmma"]

# Shared memory that a block may have, in bytes, by compute capability (CUDA programming guide, "Technical
# specifications per compute capability", less the 1 KiB that the system takes).
SHARED_MEMORY = {
    "8.0": 166_912,
    "8.6": 101_376,
    "8.7": 166_912,
    "8.9": 101_376,
    "9.0": 232_448,
    "10.0": 232_448,
    "10.3": 232_448,
    "12.0": 101_376,
    "12.1": 101_376,
}

# Barriers and alignment, beside the scratch memory that a kernel asks for.
_RESERVED = 1024


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a kernel needs to know of the machine.

    Attributes:
      instruction: the matrix instruction: "mma" on registers (sm_80 and later), or "wgmma" of four warps on
        operands in shared memory (sm_90).
      tma: whether tiles are copied by the tensor memory accelerator (sm_90 and later) or else by `cp.async`.
      shared_memory: bytes that a block may use.
      interpret: whether the kernel runs in the interpreter, with race detection, on any machine.
    """

    instruction: Instruction = "mma"
    tma: bool = True
    shared_memory: int = SHARED_MEMORY["9.0"] - _RESERVED
    interpret: bool = False

    @classmethod
    def of_capability(cls, capability: str) -> "Hardware":
        """That of an NVIDIA GPU with this compute capability, such as "9.0".

        Raises:
          NotImplementedError: there are no kernels for it.
        """
        if capability not in SHARED_MEMORY:
            known = ", ".join(SHARED_MEMORY)
            raise NotImplementedError(f"compute capability {capability} has no fused kernels, only {known} have")
        return cls(
            "wgmma" if capability == "9.0" else "mma",
            int(capability.split(".")[0]) >= 9,
            SHARED_MEMORY[capability] - _RESERVED,
        )


INTERPRETER = Hardware(interpret=True)
"""The interpreter, as a GPU that multiplies by "mma"."""


def detect() -> Hardware:
    """That of the default device.

    Raises:
      NotImplementedError: it is no NVIDIA GPU, or one without kernels; the message says what it is.
    """
    device = get_default_device()
    capability = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or capability is None:
        raise NotImplementedError(f"the default device is a {device.platform.upper()}, no NVIDIA GPU")
    return Hardware.of_capability(str(capability))
