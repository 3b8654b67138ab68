"""More texts to fit to than were given: a causal language model writes them itself.

It continues pieces of the fit examples, and knows its own predictions on what it wrote (Liu et al., "LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models", Findings of ACL 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.calibration.calibration import Calibration
from compressor.calibration.examples import CalibrationData
from compressor.calibration.settings import CalibrationSettings
from compressor.calibration.written_text import Sampler, continued, continues_texts, vocabulary_of
from compressor.data import Batch


def texts_to_write(calibration: Calibration) -> int:
    """How many texts a model writes: as many as the settings say, or as a forward on them has the multiplications that
    examples made unasked may have. 0 for what is no causal language model, or would not double its examples."""
    if calibration.criterion != "likelihood":
        return 0
    return most_texts(calibration.model, calibration.data, device=calibration.run.device, settings=calibration.settings)


def most_texts(model: nn.Module, data: CalibrationData, *, device: torch.device, settings: CalibrationSettings) -> int:
    """The same before anything is calibrated."""
    examples = _whole(data) if continues_texts(model) else []
    if not examples or len(examples[0]) < 2:
        return 0
    made = settings.self_generated
    most = made.most_multiplications if device.type == "cpu" else made.most_multiplications_accelerated
    each = len(examples[0]) * sum(map(torch.numel, model.parameters()))
    fitted = data.examples // settings.refit_every
    count = min(settings.end_to_end.texts * fitted, int(most / each))
    return count if count >= fitted else 0


def written_texts(calibration: Calibration) -> list[Batch]:
    """The texts, as long as the longest examples, in batches; seeded."""
    count, settings = texts_to_write(calibration), calibration.settings
    if not count:
        return []
    model, examples = calibration.model, _whole(calibration.data)
    length = len(examples[0])
    prompt = max(1, length // settings.end_to_end.prompts)
    generator = torch.Generator().manual_seed(calibration.run.seed)
    rows = torch.randint(len(examples), (count,), generator=generator).tolist()
    places = torch.randint(length - prompt + 1, (count,), generator=generator).tolist()
    prompts = torch.stack([examples[row][at : at + prompt] for row, at in zip(rows, places, strict=True)])
    sampler = Sampler(generator, vocabulary_of(model), settings.self_generated)
    parts = torch.split(prompts, settings.self_generated.at_once)
    texts = []
    for part in parts:
        texts.append(continued(model, part, length, sampler=sampler, told=lambda *_: None))
        calibration.run.report("generate", len(texts), len(parts))
    batches = torch.split(torch.cat(texts), max(1, settings.tokens_at_once // length))
    return [Batch({"input_ids": each}, each[:, 1:]) for each in batches]


def _whole(data: CalibrationData) -> list[Tensor]:
    """The longest fit examples, without padding; none where the model takes more than texts."""
    found: list[Tensor] = []
    for chunk in data.chunks("fit"):
        inputs = data.read(chunk).inputs
        texts, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if texts is None or texts.dim() != 2 or inputs.keys() - {"input_ids", "attention_mask"}:
            return []
        found += [row for place, row in enumerate(texts.cpu()) if mask is None or bool(mask[place].all())]
    length = max(map(len, found), default=0)
    return [row for row in found if len(row) == length]
