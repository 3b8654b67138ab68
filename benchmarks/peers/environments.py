"""Makes the environments that the other quantizers of benchmarks/bytes.py run in, one each.

    python benchmarks/peers/environments.py FOLDER [PIP_OPTION ...]

Each requirements-NAME.txt is installed into a virtual environment FOLDER/NAME. Further options are those of `pip
install`, such as `--extra-index-url https://download.pytorch.org/whl/cpu` for a PyTorch without CUDA.
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

SCRIPTS = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    asked, options = parser.parse_known_args()
    for requirements in sorted(SCRIPTS.glob("requirements-*.txt")):
        environment = asked.folder / requirements.stem.removeprefix("requirements-")
        venv.create(environment, with_pip=True)
        install = [environment / "bin" / "python", "-m", "pip", "install", "--requirement", requirements]
        subprocess.run([*map(str, install), *options], check=True)


if __name__ == "__main__":
    main()
