"""Every reference model at every size: it runs, and what is restored from it scores what it scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import compress, restore
from compressor.evaluation import load_model, load_preprocessing, measure_quality, open_data

CARDS = Path(__file__).parents[1] / "model_cards"
MLP = CARDS / "digits-mlp"
MODELS = {
    "digits-mlp": (MLP / "model.safetensors", "builtin:digits", f"{MLP / 'train.py'}:build_model"),
    "digits-resnet": (CARDS / "digits-resnet", "builtin:digits", None),
    "digits-vit": (CARDS / "digits-vit", "builtin:digits", None),
    "stdlib-llama": (CARDS / "stdlib-llama", "builtin:stdlib", None),
}


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_the_restored_model_scores_what_the_compressed_one_scores(name: str, keep: float, tmp_path: Path) -> None:
    source, spec, factory = MODELS[name]
    small, dense = (tmp_path / f"{which}{source.suffix}" for which in ("small", "dense"))
    report = compress(source, output=small, keep=keep)
    assert report.plan.eligible_after <= keep * report.plan.eligible_before
    restore(small, output=dense)
    prepared = load_preprocessing(source) if source.is_dir() else None
    data = open_data(
        spec,
        limit=48,
        tokenizer=prepared.tokenizer if prepared else None,
        image_processor=prepared.image_processor if prepared else None,
        sequence_length=prepared.sequence_length if prepared else None,
    )
    compressed, restored = (measure_quality(load_model(model, factory), data, device="cpu") for model in (small, dense))
    assert restored.loss == pytest.approx(compressed.loss, rel=1e-4)
    assert restored.count == compressed.count
