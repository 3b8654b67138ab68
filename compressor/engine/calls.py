"""A job and its item as bytes for another process, and what comes back."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from compressor.errors import CompressorError, first_line
from compressor.version import VERSION

T = TypeVar("T")


def packed(job: Callable[[T], Any], item: T) -> bytes:
    """A job and its item; tensors as their bytes, because memory that processes share is small in containers."""
    return pickle.dumps((VERSION, pickle.dumps((job, item), pickle.HIGHEST_PROTOCOL)), pickle.HIGHEST_PROTOCOL)


def carried_out(call: bytes) -> bytes:
    """Do a packed job, with one thread, and pack its result or what it raised."""
    torch.set_num_threads(1)
    try:
        version, content = pickle.loads(call)
        if version != VERSION:
            raise CompressorError(f"a worker has version {VERSION} of compressor instead of {version}")
        job, item = pickle.loads(content)
        return pickle.dumps((job(item), None), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps((None, _portable(error)), pickle.HIGHEST_PROTOCOL)


def unpacked(reply: bytes) -> Any:
    """The result of a job; raises what the job raised."""
    result, error = pickle.loads(reply)
    if error is not None:
        raise error
    return result


def _portable(error: Exception) -> Exception:
    """An error that survives pickling, with a note of where it was raised."""
    error.add_note("In a worker: " + "".join(traceback.format_exception(error)))
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    same = type(again) is type(error) and str(again) == str(error)
    return error if same else CompressorError(f"{type(error).__name__}: {first_line(error)}")
