"""What a model says of its low-rank layers survives being written and read, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.lowrank import LayerSpec, LowRankSpec

LAYERS = st.builds(
    LayerSpec,
    form=st.sampled_from(["plain", "pivoted", "channel", "spatial"]),
    rank=st.integers(1, 10_000),
    kind=st.sampled_from(["linear", "transposed linear", "convolution", "transposed convolution", "embedding"]),
    share=st.none() | st.floats(0, 1),
)
SPECS = st.builds(LowRankSpec, st.dictionaries(st.text(), LAYERS, max_size=4))
GOOD = {"form": "plain", "rank": 3, "kind": "linear"}


@given(SPECS)
def test_it_is_read_as_it_was_written(spec: LowRankSpec) -> None:
    assert LowRankSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert LowRankSpec.from_dict(json.loads(json.dumps(spec.to_config()))) == spec
    assert spec.renamed(lambda name: name + "!").renamed(lambda name: name[:-1]) == spec


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (3, "a form, a rank and a kind"),
        ({"form": "plain", "rank": 3}, "a form, a rank and a kind"),
        (GOOD | {"scale": 4}, "a form, a rank and a kind"),
        (GOOD | {"bits": 99}, "99 bits"),
        (GOOD | {"bits": 4, "group_size": "32"}, "groups of '32'"),
        (GOOD | {"form": "dense"}, "no low-rank form 'dense'"),
        (GOOD | {"form": ["plain"]}, "no low-rank form"),
        (GOOD | {"rank": 0}, "0 is not a rank"),
        (GOOD | {"rank": True}, "True is not a rank"),
        (GOOD | {"kind": "other"}, "no kind of layer 'other'"),
        (GOOD | {"share": math.inf}, "inf is not a share"),
        (GOOD | {"share": "1"}, "'1' is not a share"),
    ],
)
def test_what_is_wrong_with_a_layer_is_said_with_its_name(layer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"does not say which layers are low-rank: fc: .*{words}"):
        LowRankSpec.from_dict({"format_version": 1, "layers": {"fc": layer}})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"layers": {}}, "None is not a version"),
        ({"format_version": "1", "layers": {}}, "'1' is not a version"),
        ({"format_version": 5, "layers": {}}, "low-rank format 5.*upgrade it"),
        ({"format_version": 4, "layers": {}, "source_quantization": "fp8"}, "does not say how the layers are stored"),
        ({"format_version": 4, "layers": {}, "batched": 3}, "does not say which experts"),
        ({"format_version": 4, "layers": {}, "batched": [["experts"]]}, "does not say which experts"),
        ({"format_version": 1}, "does not say which layers are low-rank"),
        ({"format_version": 1, "layers": {"fc": GOOD}.items()}, "does not say which layers are low-rank"),
    ],
)
def test_another_document_is_refused(document: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LowRankSpec.from_dict(document)
