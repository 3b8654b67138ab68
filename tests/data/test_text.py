"""Texts as rows of tokens: how much of a large one is read, from where, and where documents begin and end."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from compressor.calibration import split_examples
from compressor.data import EvaluationData, Preprocessing, Sample, halves, load_preprocessing, open_data
from compressor.data.text import PIECE, WHOLE_BYTES, Corpus
from compressor.errors import BadInput

LENGTH = 64
LINE = 16


class CodePoints:
    """A token for every character; counts those that it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [ord(character) for character in text]}


def words(row: Tensor) -> str:
    return "".join(map(chr, row.tolist()))


def rows_of(data: EvaluationData) -> Tensor:
    return torch.cat([batch.inputs["input_ids"] for batch in data])


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB of lines, each of which says at what byte it begins."""
    path = tmp_path_factory.mktemp("large") / "large.txt"
    path.write_text("".join(f"{place:015d}\n" for place in range(0, 20_000_000, LINE)))
    return path


def place_of(row: Tensor) -> int:
    """At what byte a window of numbered lines begins."""
    text = words(row)
    after = text.index("\n") + 1
    return int(text[after : after + LINE - 1]) - after


@pytest.mark.slow
def test_of_a_large_text_no_more_is_read_and_tokenized_than_is_used(numbered: Path) -> None:
    tokenizer = CodePoints()
    tracemalloc.start()
    data = open_data(numbered, Preprocessing(tokenizer=tokenizer, sequence_length=LENGTH), Sample(limit=50))
    windows = rows_of(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert windows.shape == (50, LENGTH)
    assert tokenizer.characters <= 50 * 8 * LENGTH
    assert peak < 2_000_000
    assert "100 % of the text" in data.unused


@pytest.mark.slow
def test_windows_come_from_evenly_spaced_places_and_are_the_same_each_time(numbered: Path) -> None:
    first, again = (
        open_data(numbered, Preprocessing(tokenizer=CodePoints(), sequence_length=LENGTH), Sample(limit=40))
        for _ in range(2)
    )
    assert torch.equal(rows_of(first), rows_of(again))
    stride = numbered.stat().st_size / 40
    for index, row in enumerate(rows_of(first)):
        assert index * stride - 1 <= place_of(row) <= index * stride + 2 * LINE


def test_windows_that_decide_and_windows_that_are_reported_have_nothing_in_common(numbered: Path) -> None:
    data = open_data(numbered, Preprocessing(tokenizer=CodePoints(), sequence_length=LENGTH), Sample(limit=40))
    calibration = split_examples(data)
    parts = [rows_of(half) for half in halves(data)]
    for one, other in (
        parts,
        [torch.cat([batch.inputs["input_ids"] for batch in part]) for part in (calibration.fit, calibration.holdout)],
    ):
        places = sorted(place_of(row) for row in (*one, *other))
        assert len(places) == 40
        assert all(after - before >= LENGTH for before, after in pairwise(places))


@pytest.mark.slow
def test_without_a_limit_every_window_of_a_large_text_is_used(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"line {number} of many, é and 漢字\n" for number in range(WHOLE_BYTES // 20))
    path.write_text(text)
    windows = rows_of(open_data(path, Preprocessing(tokenizer=CodePoints(), sequence_length=LENGTH)))
    whole = torch.tensor([ord(character) for character in text])
    assert torch.equal(windows.flatten(), whole[: len(whole) // LENGTH * LENGTH])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_windows_begin_and_end_between_characters(end: str, tmp_path: Path) -> None:
    text = f"aé漢😀{end}" * (WHOLE_BYTES // 8)
    path = tmp_path / "text.md"
    path.write_bytes(text.encode("utf-8-sig"))
    assert path.stat().st_size > WHOLE_BYTES
    data = open_data(path, Preprocessing(tokenizer=CodePoints(), sequence_length=LENGTH), Sample(limit=33))
    lines = "aé漢😀\n" * LENGTH
    assert all(words(row) in lines for row in rows_of(data))


def test_a_text_in_pieces_is_the_text(tmp_path: Path) -> None:
    lines = "".join(f"  line {number}\n\n" for number in range(PIECE // 8))
    (tmp_path / "a.txt").write_bytes(lines.replace("\n", "\r\n").encode("utf-8-sig"))
    corpus = Corpus((tmp_path / "a.txt", "x" * (2 * PIECE + 1), "", tmp_path / "a.txt"), "<|end|>")
    pieces = list(corpus.pieces())
    assert "".join(pieces) == f"{lines}<|end|>{'x' * (2 * PIECE + 1)}<|end|><|end|>{lines}"
    assert max(map(len, pieces)) <= PIECE


@pytest.mark.parametrize("limit", [None, 20])
def test_a_large_file_that_is_no_utf8_is_refused_with_the_place(limit: int | None, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    text = b"one line\n" * (WHOLE_BYTES // 8)
    place = len(text) // 2 // 9 * 9
    path.write_bytes(text[:place] + b"\xe9" + text[place:])
    with pytest.raises(BadInput, match=f"not UTF-8 text, at byte {place}"):
        list(open_data(path, Preprocessing(tokenizer=CodePoints(), sequence_length=LENGTH), Sample(limit=limit)))


def test_of_the_standard_library_no_more_is_tokenized_than_is_used() -> None:
    tokenizer = CodePoints()
    data = open_data(
        "builtin:stdlib", Preprocessing(tokenizer=tokenizer, sequence_length=LENGTH), Sample(split="train", limit=128)
    )
    assert rows_of(data).shape == (128, LENGTH)
    assert tokenizer.characters <= 128 * 8 * LENGTH


LETTERS = "abcdefgh"
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "<end>": 4}


def tokenizer_of_letters(**special: str) -> PreTrainedTokenizerFast:
    """A token for each letter, 5 to 12, between 2 and 3."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocabulary = SPECIAL | {letter: 5 + i for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **special,
    )


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    return tokenizer_of_letters()


DOCUMENTS = ("abc", "de", "abcdefgh")


def written(form: str, folder: Path) -> Path:
    """The documents as a file or folder of the form."""
    if form == "folder":
        for number, text in enumerate(DOCUMENTS):
            path = folder / "texts" / f"{number}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return folder / "texts"
    lines = {
        "txt": [f"{text}\n\n" for text in DOCUMENTS],
        "jsonl": [json.dumps({"text": text}) + "\n" for text in DOCUMENTS],
        "csv": ["text\n", *(f"{text}\n" for text in DOCUMENTS)],
    }
    path = folder / f"data.{form}"
    path.write_text("".join(lines[form]))
    return path


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "folder"])
def test_an_encoder_gets_a_document_in_a_row_with_its_special_tokens(
    form: str, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = open_data(written(form, tmp_path), Preprocessing(tokenizer=letters, sequence_length=7, reading="documents"))
    (batch,) = data
    assert batch.inputs["input_ids"].tolist() == [
        [2, 5, 6, 7, 3, 0, 0],
        [2, 8, 9, 3, 0, 0, 0],
        [2, 5, 6, 7, 8, 9, 3],
        [2, 10, 11, 12, 3, 0, 0],
    ]
    assert torch.equal(batch.inputs["attention_mask"], (batch.inputs["input_ids"] != 0).long())
    assert torch.equal(batch.masks[-1], batch.inputs["attention_mask"])
    assert data.read([1]).inputs["input_ids"].tolist() == [[2, 8, 9, 3]]


@pytest.mark.parametrize("form", ["jsonl", "csv", "folder"])
def test_a_decoders_documents_are_joined_by_its_end_of_text(form: str, tmp_path: Path) -> None:
    data = open_data(
        written(form, tmp_path), Preprocessing(tokenizer=tokenizer_of_letters(eos_token="<end>"), sequence_length=17)
    )
    assert rows_of(data).tolist() == [[2, 5, 6, 7, 4, 8, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3]]


@pytest.mark.slow
def test_of_many_documents_no_more_are_tokenized_than_are_used(
    letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path, number = tmp_path / "lines.txt", WHOLE_BYTES // 4
    path.write_text("".join(f"{LETTERS[index * 8 // number] * 3}\n" for index in range(number)) + "\n")
    data = open_data(path, Preprocessing(tokenizer=letters, sequence_length=8, reading="documents"), Sample(limit=16))
    assert rows_of(data).tolist() == [[2, *[5 + index // 2] * 3, 3] for index in range(16)]
    assert data.unused == f"{number - 16:,} of {number:,} documents"


@pytest.mark.parametrize("blank", ["\n", "\r\n", " \t\r\n"])
def test_blank_lines_are_no_documents(blank: str, letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("".join(f"{blank}{letter * 3}\r\n" for letter in LETTERS[:8]).encode())
    data = open_data(path, Preprocessing(tokenizer=letters, sequence_length=8, reading="documents"), Sample(limit=4))
    assert rows_of(data).tolist() == [[2, *[5 + 2 * index] * 3, 3] for index in range(4)]
    assert data.unused == "4 of 8 documents"


def test_of_a_few_long_documents_an_encoder_gets_windows_with_special_tokens(
    letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "book.md"
    path.write_text(f"{LETTERS} " * (WHOLE_BYTES // 8))
    rows = rows_of(
        open_data(path, Preprocessing(tokenizer=letters, sequence_length=32, reading="documents"), Sample(limit=5))
    )
    assert rows.shape == (5, 32)
    assert (rows[:, 0].tolist(), rows[:, -1].tolist()) == ([2] * 5, [3] * 5)


READING: dict[str, tuple[dict[str, Any], str]] = {
    "LlamaForCausalLM": ({"model_type": "llama"}, "tokens"),
    "LlamaForSequenceClassification": ({"model_type": "llama"}, "tokens"),
    "GPT2LMHeadModel": ({"model_type": "gpt2"}, "tokens"),
    "BertLMHeadModel": ({"model_type": "bert", "is_decoder": True}, "tokens"),
    "BertForMaskedLM": ({"model_type": "bert"}, "documents"),
    "EsmForMaskedLM": ({"model_type": "esm"}, "documents"),
    "BertModel": ({"model_type": "bert"}, "documents"),
    "T5EncoderModel": ({"model_type": "t5"}, "documents"),
    "T5ForConditionalGeneration": ({"model_type": "t5"}, "pairs"),
    "BartForConditionalGeneration": ({"model_type": "bart"}, "pairs"),
    "WhisperForConditionalGeneration": ({"model_type": "whisper"}, "pairs"),
    "Unheard": ({"model_type": "unheard"}, "tokens"),
}


@pytest.mark.parametrize("architecture", READING)
def test_how_a_model_reads_text_is_known_by_its_configuration(architecture: str, tmp_path: Path) -> None:
    config, reading = READING[architecture]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    assert load_preprocessing(tmp_path).reading == reading


def test_an_encoder_folder_is_calibrated_on_documents(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import compressor

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    (tmp_path / "chains.txt").write_text("".join(f"{text}\n" for text in DOCUMENTS * 4))
    found = compressor.plan(
        tmp_path / "model", keep=0.5, calibration=tmp_path / "chains.txt", effort="balanced", prefer="size", bits=16
    )
    assert found.calibration is not None
    assert (found.calibration.examples, found.calibration.holdout) == (9, 3)
