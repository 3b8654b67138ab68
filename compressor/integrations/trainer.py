"""A callback of the transformers `Trainer` that keeps where training started."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compressor.initial import keep_initial

logger = logging.getLogger(__name__)


class KeepInitial(TrainerCallback):  # type: ignore[misc]
    """Keeps the initialization of a training run beside its checkpoints, where `compress` finds it.

    That is a record of a few kilobytes where the model is what its configuration gives after the seed that was set
    last before this object was made, or after the seed of the arguments; else the state as training begins, as large
    as a checkpoint. A run that is resumed keeps what it has.

    Args:
        seed: The seed that was set before the model was built, if it is neither of these.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[KeepInitial()])
        >>> trainer.train()
        >>> compressor.compress("run/checkpoint-500", output="small/", keep=0.1)
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seeds = (torch.initial_seed(),) if seed is None else (seed,)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Keep the initial weights in `args.output_dir`, in the first process."""
        if state.global_step > 0 or not state.is_world_process_zero:
            return
        if args.fsdp or args.deepspeed:
            logger.warning(
                "the initial weights are not kept: no process has all of them; state the seed with `initial`"
            )
            return
        path = keep_initial(model, args.output_dir, seeds=(*self._seeds, args.seed))
        logger.info("where training started is kept in %s", path)
