"""The pretended accelerator: built once, and PyTorch's device type "standin" in a process that loads it."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compressor.torch_state import has_float64

SOURCE = Path(__file__).with_name("standin.cpp")


def unavailable() -> str | None:
    """Why the accelerator cannot be built here, None where it can."""
    if sys.platform != "linux":
        return "the stand-in accelerator is built on Linux only"
    return None if shutil.which("g++") else "the stand-in accelerator needs g++"


def load(folder: Path) -> torch.device:
    """Make "standin" a device of this process, from a library in a folder, which is built if it is not there.

    Before the first backward pass of the process: PyTorch starts a thread for every device then.
    """
    torch.utils.rename_privateuse1_backend("standin")
    torch._register_device_module("standin", _Module("torch.standin"))
    torch.ops.load_library(_library(folder))
    return torch.device("standin", 0)


def _library(folder: Path) -> Path:
    """The compiled library; whoever asks for it meanwhile waits."""
    root = Path(torch.__file__).parent
    include, libraries = root / "include", root / "lib"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(SOURCE)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-isystem", str(include)]
    command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    key = hashlib.sha256(repr((command, torch.__version__)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"standin-{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = subprocess.run([*command, "-o", f"{library}.part"], capture_output=True, text=True, check=False)
            assert made.returncode == 0, f"the stand-in accelerator does not compile:\n{made.stderr}"
            Path(f"{library}.part").replace(library)
    return library


class _Module(ModuleType):
    """What PyTorch asks the module of a device, `torch.cuda` of CUDA."""

    def is_available(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        """There is nothing to start."""

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def get_device_name(self, device: Any = None) -> str:
        return "a stand-in"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        torch.ops.standin.seed(seed)

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        state: torch.Tensor = torch.ops.standin.rng_state(device)
        return state

    def set_rng_state(self, state: torch.Tensor, device: int = 0) -> None:
        torch.ops.standin.set_rng_state(state, device)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count what the accelerator does while the block runs, by the names of operators.

    Beside them: "synchronize", "item" (those of reading a number), "copy to device", "copy to host", and the bytes of
    these.
    """
    found: Counter[str] = Counter()
    before = Counter(dict(torch.ops.standin.counts()))
    yield found
    found.update(Counter(dict(torch.ops.standin.counts())) - before)


@contextmanager
def failing(operator: str) -> Iterator[None]:
    """Let an operator of linear algebra raise on the accelerator, as cuSOLVER's do on some ill-conditioned matrices."""
    torch.ops.standin.fail(operator)
    try:
        yield
    finally:
        torch.ops.standin.fail("")


@contextmanager
def without_float64() -> Iterator[None]:
    """Let the accelerator have no float64, as Apple's."""
    torch.ops.standin.narrow(True)
    has_float64.cache_clear()
    try:
        yield
    finally:
        torch.ops.standin.narrow(False)
        has_float64.cache_clear()


@contextmanager
def memory(free: int) -> Iterator[None]:
    """Let so many bytes of the first device be free."""
    torch.ops.standin.capacity(torch.accelerator.memory_allocated(0) + free)
    try:
        yield
    finally:
        torch.ops.standin.capacity(2**40)
