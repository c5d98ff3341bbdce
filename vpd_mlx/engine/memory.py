"""Lack of memory, as mlx words it: both updates and rollouts go on with less at a time."""

from __future__ import annotations

import gc

import mlx.core as mx

__all__ = ["free", "out_of_memory"]

# When allocating, or from a failed command buffer on Metal.
WORDS = ("Unable to allocate", "Insufficient Memory", "OutOfMemory", "greater than the maximum allowed buffer")


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in WORDS)


def free() -> None:
    """Give back what a failed attempt left behind: its frames hold arrays, some of them in cycles with the error."""
    gc.collect()
    mx.clear_cache()
