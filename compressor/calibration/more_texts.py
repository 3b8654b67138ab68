"""More texts to fit to than were given: a causal language model writes them itself.

It continues pieces of the fit examples, and knows its own predictions on what it wrote (Liu et al., "LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models", Findings of ACL 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.calibration.calibration import Calibration
from compressor.calibration.written_text import Sampler, continued
from compressor.data import Batch


def texts_to_write(calibration: Calibration) -> int:
    """How many texts a model writes: as many as the settings say, or as a forward on them has the multiplications that
    examples made unasked may have. 0 for what is no causal language model, or would not double its examples."""
    model, settings = calibration.model, calibration.settings
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    of_decoder = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    examples = _whole(calibration) if of_decoder and calibration.criterion == "likelihood" else []
    if not examples or len(examples[0]) < 2:
        return 0
    made = settings.self_generated
    accelerated = calibration.run.device.type != "cpu"
    most = made.most_multiplications_accelerated if accelerated else made.most_multiplications
    each = len(examples[0]) * sum(map(torch.numel, model.parameters()))
    fitted = calibration.data.examples // settings.refit_every
    count = min(settings.refinement.end_to_end.texts * fitted, int(most / each))
    return count if count >= fitted else 0


def written_texts(calibration: Calibration) -> list[Batch]:
    """The texts, as long as the longest examples, in batches; seeded."""
    count, settings = texts_to_write(calibration), calibration.settings
    if not count:
        return []
    model, examples = calibration.model, _whole(calibration)
    length = len(examples[0])
    prompt = max(1, length // settings.refinement.end_to_end.prompts)
    generator = torch.Generator().manual_seed(calibration.run.seed)
    rows = torch.randint(len(examples), (count,), generator=generator).tolist()
    places = torch.randint(length - prompt + 1, (count,), generator=generator).tolist()
    prompts = torch.stack([examples[row][at : at + prompt] for row, at in zip(rows, places, strict=True)])
    config: Any = model.config
    size = (getattr(config, "text_config", None) or config).vocab_size
    sampler = Sampler(generator, size, settings.self_generated)
    parts = torch.split(prompts, settings.self_generated.at_once)
    texts = []
    for part in parts:
        texts.append(continued(model, part, length, sampler=sampler, told=lambda *_: None))
        calibration.run.report("generate", len(texts), len(parts))
    batches = torch.split(torch.cat(texts), max(1, settings.tokens_at_once // length))
    return [Batch({"input_ids": each}, each[:, 1:]) for each in batches]


def _whole(calibration: Calibration) -> list[Tensor]:
    """The longest fit examples, without padding; none where the model takes more than texts."""
    found: list[Tensor] = []
    for chunk in calibration.data.chunks("fit"):
        inputs = calibration.data.read(chunk).inputs
        texts, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if texts is None or texts.dim() != 2 or inputs.keys() - {"input_ids", "attention_mask"}:
            return []
        found += [row for place, row in enumerate(texts.cpu()) if mask is None or bool(mask[place].all())]
    length = max(map(len, found), default=0)
    return [row for row in found if len(row) == length]
