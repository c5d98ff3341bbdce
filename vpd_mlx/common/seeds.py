"""Seeds by name, so that nothing hidden has to be restored on resume."""

from __future__ import annotations

import hashlib

__all__ = ["phase_seed"]


def phase_seed(seed: int, step: int, phase: str) -> int:
    """A seed for one phase of one step; reseeding from it leaves nothing hidden to restore on resume."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{phase}".encode()).digest()[:7], "big")
