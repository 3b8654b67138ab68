"""How the work of a command is done: on which device, where its jobs run, and what of it is done already."""

from __future__ import annotations

from compressor.engine.engine import Engine, InProcess
from compressor.engine.journal import Fingerprint, Journal, Units, digest_of
from compressor.engine.pool import ProcessPool
from compressor.engine.ray import RayEngine
from compressor.engine.request import opened_engine, processors
from compressor.engine.run import Run

__all__ = [
    "Engine",
    "Fingerprint",
    "InProcess",
    "Journal",
    "ProcessPool",
    "RayEngine",
    "Run",
    "Units",
    "digest_of",
    "opened_engine",
    "processors",
]
