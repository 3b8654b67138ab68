"""A tokenizer in the keys of GGUF, where llama.cpp splits text into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.documents import read_text
from compressor.errors import BadInput

if TYPE_CHECKING:
    from gguf import GGUFWriter

_REMEDY = "export it with `to='dense'`, and from there with llama.cpp's convert_hf_to_gguf.py"
_OTHERS = "give the tokenizer of this model"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What splits text before it is tokenized, and what llama.cpp calls that (`llama-vocab.cpp`).
_SPLITS: Mapping[str, str] = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    "ByteLevel": "gpt-2",
    "Digits, ByteLevel": "smollm",
}


def write_tokenizer(writer: GGUFWriter, folder: Path, *, size: int) -> None:
    """Write the tokenizer of a transformers folder, padded to the `size` of the embedding.

    A folder without one gives a file without one, which runs on the numbers of tokens. Raises `BadInput` for a
    tokenizer that llama.cpp does not have, or that needs a package that is not installed.
    """
    if (folder / "tokenizer.model").is_file():
        _write_sentencepiece(writer, folder, size)
    elif (path := folder / "tokenizer.json").is_file():
        _write_byte_level(writer, folder, _document(path), size=size)
    elif (folder / "tokenizer_config.json").is_file():
        raise BadInput("has a tokenizer without tokenizer.json", where=folder, remedy=_REMEDY)
    else:
        writer.add_tokenizer_model("none")


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise BadInput("is no JSON document", where=path, remedy=_OTHERS) from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise BadInput("is no tokenizer", where=path, remedy=_OTHERS)
    return found


def _split(tokenizer: Mapping[str, Any]) -> str | None:
    """What splits text before it is tokenized: a pattern, or the names of the steps."""
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [str(part.get("type")) for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated" and not parts[1].get("use_regex"):
        pattern: str | None = (parts[0].get("pattern") or {}).get("Regex")
        return pattern
    if not parts[-1].get("use_regex", True):
        return None
    return ", ".join(kinds) if kinds == ["ByteLevel"] or parts[0].get("individual_digits") else None


def _write_byte_level(writer: GGUFWriter, folder: Path, tokenizer: Mapping[str, Any], *, size: int) -> None:
    """A tokenizer of bytes that are joined by a list of merges, as GPT-2, Llama 3, and Qwen have it."""
    from gguf import SpecialVocab, TokenType

    model, where = tokenizer["model"], folder / "tokenizer.json"
    special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    # Where no tokens are joined it does not matter how text was split.
    split = _SPLITS.get(_split(tokenizer) or "") if special.merges else "gpt-2"
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    if model.get("type") != "BPE" or model.get("byte_fallback") or split is None or normalizer != "NFC":
        raise BadInput("is a tokenizer that llama.cpp is not known to have", where=where, remedy=_REMEDY)
    if bool(model.get("ignore_merges")) != (split == "llama-bpe"):
        raise BadInput("treats its merges otherwise than llama.cpp", where=where, remedy=_REMEDY)
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    added = [(each["content"], each["id"], each.get("special")) for each in tokenizer.get("added_tokens") or ()]
    known = [(text, number, TokenType.NORMAL) for text, number in model["vocab"].items()]
    known += [(text, at, TokenType.CONTROL if special else TokenType.USER_DEFINED) for text, at, special in added]
    for text, number, kind in known:
        if not 0 <= number < size:
            what = f"has token {number}, and the embedding has {size} rows"
            raise BadInput(what, where=where, remedy=_OTHERS)
        texts[number], types[number] = text, int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special.add_special_token.setdefault("bos", False)
    special.merges = special.merges or ["none none"]  # llama.cpp wants one; this joins nothing, since none is a byte
    special.add_to_gguf(writer, quiet=True)


def _write_sentencepiece(writer: GGUFWriter, folder: Path, size: int) -> None:
    """A tokenizer of SentencePiece, as Llama 2, Mistral, and Gemma have it."""
    from gguf import SentencePieceVocab, SpecialVocab, TokenType

    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'compressor[gguf]'"
        raise BadInput("reading tokenizer.model needs sentencepiece, which is not installed", remedy=remedy) from error
    vocabulary = list(SentencePieceVocab(folder).all_tokens())
    if len(vocabulary) > size:
        what = f"has {len(vocabulary)} tokens, and the embedding has {size} rows"
        raise BadInput(what, where=folder / "tokenizer.model", remedy=_OTHERS)
    vocabulary += [(f"[PAD{number}]".encode(), -10000.0, TokenType.UNUSED) for number in range(len(vocabulary), size)]
    config = folder / "tokenizer_config.json"
    settings = json.loads(read_text(config)) if config.is_file() else {}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        if int(number) < size and vocabulary[int(number)][2] not in (TokenType.UNKNOWN, TokenType.BYTE):
            vocabulary[int(number)] = (token["content"].encode(), -1000.0, kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in vocabulary])
    writer.add_token_scores([score for _, score, _ in vocabulary])
    writer.add_token_types([int(kind) for _, _, kind in vocabulary])
    if not settings.get("add_prefix_space", True) or "Gemma" in settings.get("tokenizer_class", ""):
        writer.add_add_space_prefix(False)
    SpecialVocab(folder, n_vocab=size).add_to_gguf(writer, quiet=True)
