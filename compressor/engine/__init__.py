"""How the work of a command is done: on which device, and what of it is done already."""

from __future__ import annotations

from compressor.engine.journal import Fingerprint, Journal, digest_of
from compressor.engine.run import Run

__all__ = ["Fingerprint", "Journal", "Run", "digest_of"]
