"""The packages; all else is in pyproject.toml, which can either discover packages or name one that lies elsewhere."""

from setuptools import find_packages, setup

# `cli/` lies beside the package and is installed inside it.
setup(packages=[*find_packages(include=["compressor", "compressor.*"]), "compressor.cli"])
