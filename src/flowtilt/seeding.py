"""Seeds from names, so that any run alone and in any order gives the same result."""

from __future__ import annotations

import hashlib


def seed_of(*parts: str | float) -> int:
    """A 63-bit seed from the parts of a run's own name."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
