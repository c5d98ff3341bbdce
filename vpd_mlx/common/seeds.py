"""Seeds by name, so that a resumed run restores no generator."""

from __future__ import annotations

import hashlib

__all__ = ["phase_seed"]


def phase_seed(seed: int, step: int, phase: str) -> int:
    """The seed of one phase of one step, the same in a resumed run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{phase}".encode()).digest()[:7], "big")
