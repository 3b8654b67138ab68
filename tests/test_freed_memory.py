"""What was freed goes back to the system, so that nothing grows with the number of batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor import TimingSettings
from compressor.calibration.segments import Segments
from compressor.data import Batch, EvaluationData, open_data
from compressor.evaluation import measure_quality
from compressor.evaluation.cost import measure_latency
from compressor.evaluation.custom_metric import LoaderBatches
from compressor.freed_memory import FreedMemory, freed_memory

BATCHES, BLOCKS, BLOCK, PIN = 16, 16, 2**22, 2**16


class Leaves(nn.Module):
    """A linear layer whose forward leaves holes between small tensors that live on, each time larger ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(3, 2), list[Tensor]()

    @property
    def calls(self) -> int:
        return len(self.kept) // BLOCKS

    def forward(self, input: Tensor) -> Tensor:
        blocks, size = [], BLOCK + 2**16 * self.calls
        for _ in range(BLOCKS):
            blocks.append(torch.empty(size, dtype=torch.uint8).fill_(1))
            self.kept.append(torch.empty(PIN, dtype=torch.uint8).fill_(1))
        outputs: Tensor = self.linear(input)
        return outputs


def data() -> EvaluationData:
    return open_data((torch.randn(4 * BATCHES, 3), torch.arange(4 * BATCHES) % 2), batch_size=4)


def measured(model: nn.Module) -> None:
    measure_quality(model, data(), device="cpu")


def by_a_metric(model: nn.Module) -> None:
    for inputs, _ in LoaderBatches(model, data()):
        model(inputs)


def timed(model: nn.Module) -> None:
    timing = TimingSettings(warm_ups=0, fewest_repeats=BATCHES, most_repeats=BATCHES)
    measure_latency(model, {"input": torch.randn(4, 3)}, device="cpu", timing=timing)


def in_segments(model: nn.Module) -> None:
    for _ in range(BATCHES):
        Segments().run(model, 0, Batch({"input": torch.randn(4, 3)}, torch.empty(0)), state=())


@pytest.mark.parametrize("runs", [measured, by_a_metric, timed, in_segments])
def test_it_is_given_back_between_batches(runs: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, freed = list[int](), freed_memory()

    def resident() -> int:
        asked.append(1)
        return 0

    monkeypatch.setattr(freed, "resident", resident)
    monkeypatch.setattr(freed, "give", lambda: None)
    runs(nn.Linear(3, 2))
    assert len(asked) >= BATCHES


@pytest.mark.skipif(freed_memory().give is None, reason="the C library gives nothing back")
@pytest.mark.parametrize("runs", [measured, by_a_metric, timed, in_segments])
def test_holes_in_the_heap_do_not_add_up(runs: Callable[[nn.Module], None]) -> None:
    torch.empty(2**25 - 2**20, dtype=torch.uint8).fill_(1)  # from now on smaller blocks are taken from the heap
    freed, model = freed_memory(), Leaves()
    assert freed.give is not None
    freed.give()
    before = freed.resident()
    runs(model)
    left = BATCHES * BLOCKS * BLOCK
    assert model.calls >= BATCHES
    # What a forward leaves comes after what is given back.
    assert freed.resident() - before < freed.slack + 2 * left / BATCHES < left / 3


def test_it_is_given_back_where_much_was_added_since() -> None:
    sizes, given = iter([500, 100, 150, 190, 205, 120, 210, 225, 150]), list[int]()
    freed = FreedMemory(lambda: next(sizes), lambda: given.append(1), slack=100)
    found = []
    for _ in range(6):
        freed.give_back()
        found.append(len(given))
    # 500, and then 100 are left; 205 are more by over 100, and then 120 are left; 225 again.
    assert found == [1, 1, 1, 2, 2, 3]


def test_where_nothing_can_be_given_back_nothing_is_asked() -> None:
    FreedMemory(lambda: pytest.fail("it was asked"), None).give_back()
