"""The checkpoints of one training run as they are archived: in the order of their steps, and of one architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from compressor.archiving.change import matrix_sides
from compressor.errors import BadInput
from compressor.initial import InitialWeights, initial_name, initial_tensor
from compressor.io import Checkpoint
from compressor.io.steps import Unit
from compressor.measure.window_between import Window, window_between
from compressor.network import Layer
from compressor.recipe import TrainingRecipe


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """The checkpoints of one training run.

    Attributes:
        checkpoints: In the order of their steps.
        numbers: The step or epoch of each.
        unit: What the numbers count.
        layers: The matrices, by the names of their tensors.
        uses: How often one example uses each of them, by the layer's name.
        recipe: How all of it was trained.
        initial: The weights that training started from, where they are known.
    """

    checkpoints: Sequence[Checkpoint]
    numbers: Sequence[int]
    unit: Unit
    layers: Mapping[str, Layer]
    uses: Mapping[str, int | None]
    recipe: TrainingRecipe
    initial: InitialWeights | None = field(default=None, repr=False)

    def require_alike(self) -> None:
        """Raise `BadInput` where the checkpoints have other tensors than the first, or of another shape or dtype."""
        first = self.checkpoints[0]
        remedy = "give the checkpoints of one run"
        names = Counter(each.name for each in self.checkpoints)
        for name, count in names.items():
            if count > 1:
                what = f"{count} checkpoints are called {name}"
                raise BadInput(what, where=first.source, remedy="rename them, as in checkpoint-500")
        for other in self.checkpoints[1:]:
            if other.form != first.form:
                what = f"is a {other.form}, and {first.name} is a {first.form}"
                raise BadInput(what, where=other.source, remedy=remedy)
            if missing := sorted(first.tensors.keys() ^ other.tensors.keys()):
                what = f"{'lacks' if missing[0] in first.tensors else 'has'} {missing[0]}, unlike {first.name}"
                raise BadInput(what, where=other.source, remedy=remedy)
            for name, info in first.tensors.items():
                if info != other.tensors[name]:
                    what = f"{name} has another shape or dtype than in {first.name}"
                    raise BadInput(what, where=other.source, remedy=remedy)
            if dict(other.aliases) != dict(first.aliases):
                what = f"ties other tensors than {first.name}"
                raise BadInput(what, where=other.source, remedy=remedy)

    @cached_property
    def steps(self) -> tuple[int, ...] | None:
        """The optimizer steps before each checkpoint; None where epochs of unknown length are counted."""
        if self.unit == "step":
            return tuple(self.numbers)
        total, epochs = self.recipe.total_steps, self.recipe.total_epochs
        if total is None or not epochs:
            return None
        return tuple(round(total * number / epochs) for number in self.numbers)

    def window(self, tensor: str, index: int, since: int | None) -> Window:
        """What the memory window says of a tensor of a checkpoint since another one; since the start for None."""
        layer, steps = self.layers.get(tensor), self.steps
        if steps is None or layer is None:
            return Window()
        earlier = 0 if since is None else steps[since]
        uses = self.uses.get(layer.name) if self._is_used_alone(layer) else None
        recipe = self.recipe.of_parameter(tensor)
        return window_between(recipe, layer.shape, uses, earlier=earlier, later=steps[index])

    def _is_used_alone(self, layer: Layer) -> bool:
        """Whether a tensor is one matrix of one module, so that the uses of the layer are all of its uses."""
        tied = layer.is_tied or layer.tensor in self.checkpoints[0].aliases.values()
        one = layer.eligible and layer.groups == 1
        return one and not tied and sorted(layer.shape) == sorted(matrix_sides(layer.tensor_shape))

    def initial_of(self, tensor: str) -> Tensor | None:
        """The initial weights of a matrix in the shape of the checkpoint, where a file can name them."""
        layer, initial = self.layers.get(tensor), self.initial
        if layer is None or initial is None:
            return None
        if initial.draws is not None and initial_name(layer) not in initial.draws.names:
            return None
        return initial_tensor(layer, initial)
