"""What prepares data for a model comes from its folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from compressor.data import load_preprocessing, open_data
from compressor.errors import BadInput


def test_a_folder_without_a_usable_config_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"there is no config\.json"):
        load_preprocessing(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=message):
            load_preprocessing(tmp_path)


def test_what_prepares_data_comes_from_the_folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load_preprocessing(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert (found.image_processor, found.sequence_length) == (None, 64)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 131072}))
    assert load_preprocessing(tmp_path).sequence_length == 2048


def test_what_prepares_images_comes_from_the_folder(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    config.label2id, config.id2label = {"cat": 0, "dog": 1}, {0: "cat", 1: "dog"}
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    found = load_preprocessing(tmp_path)
    assert found.image_processor is not None
    assert found.classes == {"cat": 0, "dog": 1}
    assert (found.tokenizer, found.sequence_length) == (None, None)


def test_a_tokenizer_or_image_processor_that_cannot_be_loaded_is_bad_input_where_it_is_needed(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    (tmp_path / "text.txt").write_text("a text " * 100)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "one.png")
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((4, 8), dtype=np.int64))
    found = load_preprocessing(tmp_path)
    with pytest.raises(BadInput, match="AutoTokenizer cannot load from it"):
        open_data(tmp_path / "text.txt", found)
    with pytest.raises(BadInput, match="AutoImageProcessor cannot load from it"):
        open_data(tmp_path / "images", found)
    assert open_data(tmp_path / "ids.npz", found).count == 4
