"""What the vendors say of the chips that programs are compiled for, and how to compile for them without one.

A program is compiled ahead of time for the devices of a *topology*, which the compiler plugin of the chip's family
makes from a description (a GPU) or a name (a TPU). Sources: NVIDIA's data sheets of A100 80GB SXM, L4, H100 SXM
and B200, and the CUDA programming guide's tables of technical specifications and of arithmetic throughput;
Google's pages on Cloud TPU v5e and v6e. Peak rates are dense ones of bfloat16 products.
"""

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pallas_kernels.hardware import SHARED_MEMORY, Hardware

Family = Literal["CUDA", "TPU"]

DEVICES = 8
"""Devices in every topology."""


@dataclass(frozen=True)
class Target:
    """A chip.

    Attributes:
      name: as on the command line.
      flops: products and additions of bfloat16 matrices per second.
      bandwidth: bytes per second from and to its memory.
      memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float

    family: ClassVar[Family]

    def topology(self) -> Any:
        """Eight devices to compile for, as `jax.experimental.topologies` describes them."""
        raise NotImplementedError

    @property
    def exponentials(self) -> float | None:
        """Exponentials per second, where the vendor says."""
        return None


@dataclass(frozen=True)
class Gpu(Target):
    """An NVIDIA GPU.

    Attributes:
      product: its name in full.
      capability: compute capability.
      processors: streaming multiprocessors.
      clock: boost clock in GHz.
      l2: bytes of level-2 cache.
      threads: per multiprocessor.
      lanes: float32 lanes per multiprocessor.
    """

    product: str
    capability: str
    processors: int
    clock: float
    l2: int
    threads: int = 2048
    lanes: int = 128

    family = "CUDA"

    def topology(self) -> Any:
        from jax.experimental import topologies

        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=self.description(), topology=f"1x1x{DEVICES}"
        )

    @property
    def exponentials(self) -> float:
        return 16 * self.processors * self.clock * 1e9

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a kernel may ask for."""
        return Hardware.of_capability(self.capability).shared_memory

    def description(self) -> str:
        """The text form of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability.split(".")
        # The instructions that only this very architecture has, such as wgmma: sm_90a, sm_100a.
        accelerated = " feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else ""
        per_block = SHARED_MEMORY[self.capability]
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_core": per_block + 1024,
            "shared_memory_per_block_optin": per_block,
            "threads_per_core_limit": self.threads,
            "core_count": self.processors,
            "fpus_per_core": self.lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "memory_bandwidth": int(self.bandwidth),
            "device_memory_size": int(self.memory),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        return (
            f"gpu_device_info {{ {fields} "
            f"cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 } '
            f'device_description_str: "{self.product}"'
        )


@dataclass(frozen=True)
class Tpu(Target):
    """A Cloud TPU.

    Attributes:
      slice: the name of a topology of eight chips.
    """

    slice: str

    family = "TPU"

    def topology(self) -> Any:
        from jax.experimental import topologies

        return topologies.get_topology_desc(platform="tpu", topology_name=self.slice)


GIB = 2**30
TARGETS: Mapping[str, Gpu | Tpu] = {
    target.name: target
    for target in (
        Gpu("a100", 312e12, 2.039e12, 80 * GIB, "NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 40 * 2**20, lanes=64),
        Gpu("l4", 121e12, 0.3e12, 24 * GIB, "NVIDIA L4", "8.9", 58, 2.04, 48 * 2**20, threads=1536),
        Gpu("h100", 989e12, 3.35e12, 80 * GIB, "NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 50 * 2**20),
        Gpu("b200", 2250e12, 8e12, 180e9, "NVIDIA B200", "10.0", 148, 1.965, 126 * 2**20),
        Tpu("v5e", 197e12, 0.819e12, 16 * GIB, "v5e:2x4"),
        Tpu("v6e", 918e12, 1.64e12, 32 * GIB, "v6e:2x4"),
    )
}

# Before anything of JAX is imported. The host computes nothing but shapes and is no TPU: nothing is to be asked of
# a metadata server, no lock to be taken, no log to be left.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_PLUGIN, _PTXAS, _DISASSEMBLER = "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvdisasm"
_WHEELS: Mapping[Family, tuple[str, ...]] = {"CUDA": (_PLUGIN, "jax-cuda12-pjrt", _PTXAS), "TPU": ("libtpu",)}


def obstacle(family: Family) -> str | None:
    """Why nothing can be compiled for a family of targets with what is installed; None where it can."""
    installed = {wheel: _version(wheel) for wheel in _WHEELS[family]}
    if missing := [wheel for wheel, version in installed.items() if version is None]:
        return f"{family} targets need {', '.join(missing)}: pip install -e '.[targets]'"
    plugin, jax = installed.get(_PLUGIN), _version("jax")
    if plugin not in (None, jax):
        return f"{family} targets need {_PLUGIN} {jax}, as JAX, not {plugin}: pip install -e '.[targets]'"
    return None


def versions(family: Family) -> dict[str, str]:
    """Of everything that a compiled program depends on."""
    found = {name: _version(name) for name in ("jax", "jaxlib", *_WHEELS[family])}
    if family == "CUDA":
        found |= {"ptxas": _ptxas_version(), "nvdisasm": _version(_DISASSEMBLER)}
    return {name: version for name, version in found.items() if version is not None and name != _PTXAS}


def disassembler_root() -> Path | None:
    """The folder in whose `bin` nvdisasm lies, None where it is not installed."""
    tool = _tool(_DISASSEMBLER, "nvdisasm")
    return tool.parent.parent if tool else None


def _version(wheel: str) -> str | None:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(wheel: str, name: str) -> Path | None:
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.stem == name and "bin" in file.parts), None)


def _ptxas_version() -> str | None:
    tool = _tool(_PTXAS, "ptxas")
    if tool is None:
        return None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split(", V")[-1].split()[0]
