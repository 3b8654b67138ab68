"""The verdict: true to the numbers, and silent about what is not known."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.evaluation import (
    Change,
    Cost,
    Evaluation,
    Latency,
    LatencyChange,
    QualityChange,
    SizeChange,
    Verdict,
    judged,
)
from tests.measured import without_times

sizes = st.integers(1, 10**12)
ratios = st.floats(0.01, 100)
accuracies = st.floats(0, 1)


def quality(before: float, after: float, error: float | None = None, *, metric: str = "accuracy") -> QualityChange:
    drop = before - after if metric == "accuracy" else after - before
    return QualityChange(metric, before, after, drop, error)


def latencies(*found: float) -> tuple[LatencyChange, ...]:
    return tuple(LatencyChange(f"batch {4**number}", ratio) for number, ratio in enumerate(found))


@given(before=sizes, after=sizes)
def test_it_says_larger_when_larger_and_smaller_when_smaller(before: int, after: int) -> None:
    verdict = Verdict(SizeChange(before, after))
    assert ("larger" in str(verdict)) == (after > before) == (verdict.worse == ("size",))
    assert ("smaller" in str(verdict)) == (after < before)
    assert (str(verdict) == "same size") == (after == before)


@given(before=sizes, after=sizes)
def test_the_percentage_is_that_of_the_sizes(before: int, after: int) -> None:
    words = SizeChange(before, after).words
    share = 100 * abs(after - before) / before
    if (shown := re.match(r"([\d.]+) %", words)) is not None:
        assert float(shown[1]) == pytest.approx(share, abs=0.51 if 0.95 <= share < 99.5 or share >= 100 else 0.051)
        assert float(shown[1]) > 0
        assert float(shown[1]) < 100 or share >= 99.95
    else:
        assert words == "same size" or share < 0.05


@given(found=st.lists(ratios, max_size=5), measured=st.booleans())
def test_it_claims_no_latency_that_is_not_known_and_says_what_is_predicted(found: list[float], measured: bool) -> None:
    known = tuple(replace(each, predicted_on=None if measured else "h100") for each in latencies(*found))
    words = str(Verdict(SizeChange(4, 2), known))
    assert ("latency" in words) == bool(found)
    assert words.endswith("(predicted for its layers on h100)") == (bool(found) and not measured)
    assert words.startswith("50 % smaller")
    if measured:
        assert without_times(words) == "50 % smaller"


@given(found=st.lists(ratios, min_size=1, max_size=5))
def test_the_worst_workload_is_told(found: list[float]) -> None:
    verdict = Verdict(None, latencies(*found))
    worst = max(found)
    assert LatencyChange("", worst).words in str(verdict)
    assert ("latency" in verdict.worse) == (worst - 1 > 0.03)
    changes = [remark.change for remark in verdict.remarks]
    assert ("worse" in changes) == (worst - 1 > 0.03)


@given(before=accuracies, after=accuracies, error=st.floats(0, 1))
def test_a_drop_within_its_standard_error_is_none(before: float, after: float, error: float) -> None:
    change = quality(before, after, error).change
    expected: Change = "worse" if before - after > error else "better" if after - before > error else "same"
    assert change == expected


@given(increase=st.floats(allow_nan=False), noise=st.floats(0, 1e6))
def test_the_opposite_of_better_is_worse(increase: float, noise: float) -> None:
    opposite = {"better": "worse", "worse": "better", "same": "same"}
    assert judged(-increase, noise) == opposite[judged(increase, noise)]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (
            Verdict(SizeChange(100, 43), latencies(0.6), quality(0.983, 0.983)),
            "57 % smaller, 0.60x latency, accuracy 98.3 -> 98.3 %",
        ),
        (
            Verdict(SizeChange(100, 43), latencies(0.6, 0.8), quality(3.21, 3.4, metric="perplexity")),
            "57 % smaller, 0.60x latency at batch 1, 0.80x at 4, perplexity 3.21 -> 3.40",
        ),
        (
            Verdict(
                SizeChange(100, 43), (LatencyChange("decode, batch 1", 0.5), LatencyChange("prefill, batch 1", 1.2))
            ),
            "57 % smaller, 0.50x latency (decode, batch 1), 1.20x (prefill, batch 1)",
        ),
        (Verdict(SizeChange(100, 43), latencies(0.6, 0.8, 0.5)), "57 % smaller, 0.50x to 0.80x latency"),
        (Verdict(SizeChange(100, 43), latencies(0.601, 0.599, 0.6)), "57 % smaller, 0.60x latency"),
        (Verdict(SizeChange(1000, 1003)), "0.3 % larger"),
        (Verdict(SizeChange(10**6, 10**6 + 1)), "less than 0.1 % larger"),
        (Verdict(SizeChange(1000, 3)), "99.7 % smaller"),
        (Verdict(SizeChange(100, 7), beside_base=True), "93 % smaller beside its base"),
        (Verdict(None, (), QualityChange("perplexity", None, 3.2149)), "perplexity 3.21"),
        (Verdict(None, (), quality(3.2101, 3.2143, 0.001, metric="perplexity")), "perplexity 3.210 -> 3.214"),
        (Verdict(None, (), quality(3.2101, 3.2143, 0.1, metric="perplexity")), "perplexity 3.21 -> 3.21"),
        (Verdict(None, (), QualityChange("perplexity", 3.2, math.inf, math.inf)), "perplexity 3.20 -> infinite"),
        (Verdict(None, (), QualityChange("bleu", 31.25, 30.5, 0.75, None, True)), "bleu 31.25 -> 30.5"),
    ],
)
def test_examples(verdict: Verdict, words: str) -> None:
    assert str(verdict) == words
    assert ", ".join(remark.words for remark in verdict.remarks) == words
    assert "latency" not in without_times(words)


@given(before=sizes, after=sizes, found=st.lists(ratios, max_size=4), drop=st.floats(allow_nan=False))
def test_the_dictionary_is_json_and_agrees_with_the_words(
    before: int, after: int, found: list[float], *, drop: float
) -> None:
    verdict = Verdict(
        SizeChange(before, after), latencies(*found), QualityChange("f1", 0.5, 0.5 - drop, drop, None, True)
    )
    document = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    worse = [name for name in ("size", "quality") if document[name]["change"] == "worse"]
    worse += ["latency"] if any(each["change"] == "worse" for each in document["latency"] or ()) else []
    assert sorted("quality" if name == "f1" else name for name in verdict.worse) == sorted(worse)
    assert (document["latency"] is None) == (not found)


def test_an_evaluation_without_a_baseline_compares_nothing() -> None:
    cost, timing = Cost(10, 40, 5, 100), Latency(1, None, 0.002, None, 7)
    alone = Evaluation(
        "accuracy", None, 0.9, None, None, 0.3, 50, "d", "image-classification", "cpu", None, cost, (timing,)
    )
    assert str(alone.verdict) == "accuracy 90.0 %"
    assert [remark.change for remark in alone.verdict.remarks] == [None]
    assert alone.to_dict()["changes"]["latency"] is None
