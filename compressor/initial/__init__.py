"""Where training started: the initial weights, drawn again from their seed or read, and what is left of them."""

from __future__ import annotations

from compressor.initial.draws import Draws
from compressor.initial.fingerprint import Fingerprint
from compressor.initial.found import InitialFound, Origin, SeedSearch, StartedLayer
from compressor.initial.kept import find_kept, is_record, keep_initial, read_kept
from compressor.initial.recording import Recorded, record
from compressor.initial.search import SEARCH, FoundSeed, SearchSettings, false_hits, find_seed, what_is_searched
from compressor.initial.weights import (
    InitialWeights,
    Start,
    fitted_share,
    initial_name,
    initial_tensor,
    share_left,
    start_of,
    starts_of,
)

__all__ = [
    "SEARCH",
    "Draws",
    "Fingerprint",
    "FoundSeed",
    "InitialFound",
    "InitialWeights",
    "Origin",
    "Recorded",
    "SearchSettings",
    "SeedSearch",
    "Start",
    "StartedLayer",
    "false_hits",
    "find_kept",
    "find_seed",
    "fitted_share",
    "initial_name",
    "initial_tensor",
    "is_record",
    "keep_initial",
    "read_kept",
    "record",
    "share_left",
    "start_of",
    "starts_of",
    "what_is_searched",
]
