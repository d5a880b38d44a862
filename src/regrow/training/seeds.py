"""Where the randomness of updates comes from."""

from __future__ import annotations

import hashlib


def mix(seed: int, step: int, name: str) -> int:
    """A generator's seed from ``(seed, step, layer name)`` alone: the same on every rank and after a resume."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
