"""What the device decides, in one place.

On a GPU lengths are padded so that its kernels see few shapes, chunks of the head are larger, compilation is on, and one stream
decodes, the next token while we look at this one. `VPD_MLX_GPU_PATHS=1` makes a CPU take these ways: tests exercise them without
a GPU.
"""

from __future__ import annotations

import os
import shutil

import mlx.core as mx

__all__ = ["close", "compiles", "device_kind", "gpu_ways"]


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


def device_kind() -> str:
    """cpu, metal or cuda."""
    if not on_gpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def gpu_ways() -> bool:
    """Whether lengths, chunks and streams are a GPU's."""
    return on_gpu() or os.environ.get("VPD_MLX_GPU_PATHS") == "1"


def compiles() -> bool:
    """Whether `mx.compile` is of use. On a CPU it runs the C++ compiler for every kernel and saves nothing: for tests only."""
    return on_gpu() or (gpu_ways() and shutil.which("g++") is not None)


def close(found: mx.array, wanted: mx.array, half: float = 3e-2, dtype: mx.Dtype | None = None) -> bool:
    """Whether two ways to compute the same agree as far as the dtype and the device allow.

    `dtype` is the one computed in, if not that of the result; `half` is what half precision may be off.
    """
    tolerance = half if (dtype or wanted.dtype) != mx.float32 else 1e-2 if gpu_ways() else 1e-4
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.abs(found - wanted).max()) <= tolerance * float(mx.abs(wanted).max()) + 1e-6
