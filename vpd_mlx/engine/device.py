"""What the device decides, in one place.

On a GPU lengths are padded so that its kernels see few shapes, chunks of the head are larger, compilation is on, and one stream
decodes, the next token while we look at this one. `VPD_MLX_GPU_PATHS=1` makes a CPU take these ways: tests exercise them without
a GPU.
"""

from __future__ import annotations

import os
import shutil

import mlx.core as mx

__all__ = ["compiles", "gpu_ways"]


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


def gpu_ways() -> bool:
    """Whether lengths, chunks and streams are a GPU's."""
    return on_gpu() or os.environ.get("VPD_MLX_GPU_PATHS") == "1"


def compiles() -> bool:
    """Whether `mx.compile` is of use. On a CPU it runs the C++ compiler for every kernel and saves nothing: for tests only."""
    return on_gpu() or (gpu_ways() and shutil.which("g++") is not None)
