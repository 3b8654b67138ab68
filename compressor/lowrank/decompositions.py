"""The decompositions of layers, on disk between their measurement and their factorization."""

from __future__ import annotations

import logging
from dataclasses import replace

from compressor.engine import Journal
from compressor.errors import BadInput
from compressor.factorize import Decomposition
from compressor.measure import Precision

logger = logging.getLogger(__name__)


class KeptDecompositions:
    """Decompositions by the names of layers, in units of a journal, as many as fit in `room` bytes; others are made
    again, as precisely."""

    def __init__(self, journal: Journal, room: int | None = None, precision: Precision | None = None) -> None:
        self.precision = precision or Precision()
        self._journal = journal
        self._room = room
        self._full = False

    def put(self, name: str, found: Decomposition) -> None:
        """Keep the decomposition of a layer, if there is room for it."""
        size = found.basis.nbytes
        if self._full or (self._room is not None and size > self._room):
            return
        try:
            self._journal.write(name, found.tensors())
        except BadInput as error:
            self._full = True
            logger.warning("further layers are decomposed twice: %s", error)
        else:
            self._room = None if self._room is None else self._room - size

    def __contains__(self, name: str) -> bool:
        return self._journal.holds(name)

    def get(self, name: str) -> Decomposition | None:
        """The decomposition of a layer, on the CPU; None where it is not kept."""
        if not self._journal.holds(name):
            return None
        found = Decomposition.of(self._journal.read(name))
        # A copy: kernels may add up in another order where numbers begin at another address.
        return replace(found, basis=found.basis.clone())
