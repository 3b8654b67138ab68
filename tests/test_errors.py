"""The errors that the commands turn into exit statuses."""

from __future__ import annotations

import pickle

from compressor import BadInput


def test_bad_input_comes_back_whole_from_a_worker_process() -> None:
    error = BadInput("no such layer", where="model.safetensors", remedy="name another")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.what, back.where, back.remedy) == (str(error), error.what, error.where, error.remedy)
