"""What the test suite promises of itself."""

from __future__ import annotations

from hypothesis import settings


def test_no_property_fails_because_the_machine_is_busy() -> None:
    assert settings().deadline is None
