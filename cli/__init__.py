"""The command line: parse, call one function of the public API, render."""

from compressor.cli.main import main

__all__ = ["main"]
