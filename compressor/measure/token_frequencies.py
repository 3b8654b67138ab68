"""Statistics of embeddings and of heads with many classes: frequencies of tokens, and the gradients at their uses.

The inputs of an embedding are tokens, so their second moment is diagonal and holds the frequencies. Of the gradient at
the logits of a head only the diagonal is accumulated. What is off it, `-E[p p^T]`, is small where predictions spread
over many classes, and the diagonal `E[p (1 - p)]` is exact, where most classes would never be among sampled targets.
Nothing here grows with the square of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.measure.moments import kept_rows
from compressor.network import embedding_scale
from compressor.torch_state import in_float64, sum_in_float64


@dataclass(frozen=True)
class HeadMoments:
    """Moments of a head over `positions`, in float64.

    `hidden` is E[h h^T] (`d x d`) of its inputs, `mean` is E[h], and `logits` the diagonal of E[g g^T] of the loss
    gradient at its outputs, one number per token.
    """

    hidden: Tensor
    mean: Tensor
    logits: Tensor
    positions: int
    uses: float


@dataclass(frozen=True)
class EmbeddingMoments:
    """Moments of an embedding over `positions`, in float64.

    `frequencies` are those of its tokens, smoothed, and `gradients` is E[g g^T] (`d x d`) of the loss gradient at the
    rows that it looks up: at its outputs, times its scale if it has one. `uses` is the number of positions per
    prediction of the model, as in `Moments`. `head` is None without a tied head.
    """

    frequencies: Tensor
    gradients: Tensor
    positions: int
    uses: float
    head: HeadMoments | None


def smoothed_frequencies(counts: Tensor) -> Tensor:
    """Frequencies of tokens from their counts, with one added to each count.

    Additive smoothing (Laplace's rule of succession; Chen and Goodman, "An empirical study of smoothing techniques for
    language modeling", Computer Speech and Language, 1999, section 2.1): the fewer tokens were seen relative to the
    vocabulary, the closer the estimate is to uniform.
    """
    wide = in_float64(counts)
    return (wide + 1) / (wide.sum() + wide.numel())


class EmbeddingCollector:
    """Accumulates the moments of embeddings and heads while `collect_moments` runs the model.

    `embeddings` maps names to embeddings of one model, each with its tied head or None, and `heads` maps names to heads
    that are not tied. Inside the context, run every pass through `watched`. With `likelihood=False`, use half the
    squared change of the outputs as the loss, instead of the log-likelihood.
    """

    def __init__(
        self,
        embeddings: Mapping[str, tuple[nn.Module, nn.Module | None]],
        heads: Mapping[str, nn.Module] | None = None,
        *,
        likelihood: bool = True,
    ) -> None:
        self._embeddings, self._heads, self._likelihood = embeddings, heads or {}, likelihood
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._positions: dict[tuple[str, str], int] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._predictions = 0
        self._masks: Sequence[Tensor] = ()
        self._logits = True
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, (embedding, head) in self._embeddings.items():
            assert isinstance(embedding.weight, Tensor)
            hook = self._lookup_hook(name, vocabulary=len(embedding.weight), scale=embedding_scale(embedding))
            self._handles.append(embedding.register_forward_hook(hook, with_kwargs=True))
            if head is not None:
                self._handles.append(head.register_forward_hook(self._head_hook(name), with_kwargs=True))
        for name, head in self._heads.items():
            self._handles.append(head.register_forward_hook(self._head_hook(name), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def watched(
        self, part: Callable[[], tuple[Tensor, ...]], masks: Sequence[Tensor], *, logits: bool = True
    ) -> Callable[[], tuple[Tensor, ...]]:
        """Wrap a pass of the model, or of a part of it, so that its embeddings are observed; `masks` are false on
        padding.

        `logits` says whether the part outputs the logits, which then come first. A part that outputs nothing computed
        from the tokens it looks up adds nothing to their frequencies.
        """

        def run() -> tuple[Tensor, ...]:
            self._masks, self._logits = masks, logits
            self._outputs.clear()
            made = part()
            if not logits:
                return made
            self._predictions += len(kept_rows(made[0], masks))
            for name, outputs in self._outputs.items():
                self._weigh_classes(name, made[0], outputs)
            return made

        return run

    def moments(self) -> dict[str, EmbeddingMoments | None]:
        """The means so far; None for an embedding that was not used, or whose head predicts nothing."""
        return {name: self._moments(name, head is not None) for name, (_, head) in self._embeddings.items()}

    def head_moments(self) -> dict[str, HeadMoments | None]:
        """The means so far of the heads that are not tied; None for one that predicts nothing."""
        made = {name: self._positions.get((name, "logits"), 0) for name in self._heads}
        return {name: self._head_moments(name, positions) if positions else None for name, positions in made.items()}

    def state(self) -> dict[str, Tensor]:
        """What was gathered so far, by names for a file."""
        found = {f"{what}/{name}": each for (name, what), each in self._sums.items()}
        found |= {f"positions of {what}/{name}": torch.tensor(each) for (name, what), each in self._positions.items()}
        return found | {"predictions": torch.tensor(self._predictions)}

    def taken(self) -> dict[str, Tensor]:
        """What was gathered so far, which begins anew; that of several runs may be added up by names."""
        state = self.state()
        self._sums, self._positions, self._predictions = {}, {}, 0
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was gathered before."""
        for key, each in state.items():
            what, _, name = key.partition("/")
            if what == "predictions":
                self._predictions = int(each)
            elif what.startswith("positions of "):
                self._positions[name, what.removeprefix("positions of ")] = int(each)
            else:
                self._sums[name, what] = each

    def _moments(self, name: str, tied: bool) -> EmbeddingMoments | None:
        positions = self._positions.get((name, "gradients"), 0)
        made = self._positions.get((name, "logits"), 0)
        if not positions or (tied and not made):
            return None
        return EmbeddingMoments(
            frequencies=smoothed_frequencies(self._sums[name, "tokens"]),
            gradients=self._sums[name, "gradients"] / positions,
            positions=positions,
            uses=positions / self._predictions,
            head=self._head_moments(name, made) if tied else None,
        )

    def _head_moments(self, name: str, made: int) -> HeadMoments:
        logits = self._sums[name, "logits"]
        # Smoothed like the frequencies: as if every token had been expected once more.
        once = logits.sum() / self._sums[name, "chances"].sum()
        return HeadMoments(
            hidden=self._sums[name, "hidden"] / self._positions[name, "hidden"],
            mean=self._sums[name, "mean"] / self._positions[name, "mean"],
            logits=(logits + once) / (made + logits.numel()),
            positions=made,
            uses=made / self._predictions,
        )

    def _lookup_hook(
        self, name: str, vocabulary: int, scale: float
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            tokens: Tensor = arguments[0] if arguments else next(iter(named.values()))
            masks = self._masks  # others, where the head is applied to some positions before the gradient comes
            kept = kept_rows(tokens[..., None], masks).flatten()
            counts = torch.bincount(kept, minlength=vocabulary)

            def used(gradient: Tensor) -> None:
                self._add(name, "tokens", in_float64(counts), positions=kept.numel())
                # That at the rows of the table, which the embedding may scale.
                self._add_product(name, "gradients", scale * kept_rows(gradient, masks))

            output.requires_grad_(True)
            output.register_hook(used)  # type: ignore[no-untyped-call]
            # The next module may work in place, which autograd does not allow on a leaf.
            return output.clone()

        return hook

    def _head_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not self._logits:
                return
            hidden: Tensor = arguments[0] if arguments else next(iter(named.values()))
            vectors = kept_rows(hidden.detach(), self._masks)
            self._add_product(name, "hidden", vectors)
            self._add(name, "mean", sum_in_float64(vectors), positions=len(vectors))
            self._outputs.setdefault(name, []).append(output)

        return hook

    def _weigh_classes(self, name: str, made: Tensor, outputs: list[Tensor]) -> None:
        """Add the diagonal of E[g g^T] at a head's outputs, exactly: over the targets that the model would sample.

        At the model's logits it is `p (1 - p)`, or one if they are not logits of a likelihood. A function between the
        head and the logits (a scale, a cap) acts on each logit alone; the square of its slope is the factor.
        """
        for output in outputs:
            if output.shape != made.shape or not output.requires_grad:
                continue
            chances = kept_rows(made.detach().float().softmax(-1), self._masks)
            chances = weighted = chances * (1 - chances) if self._likelihood else torch.ones_like(chances)
            if made is not output:
                [slope] = torch.autograd.grad(made.sum(), output, retain_graph=True)
                weighted = chances * kept_rows(slope, self._masks).float().square()
            self._add(name, "chances", sum_in_float64(chances), positions=len(chances))
            self._add(name, "logits", sum_in_float64(weighted), positions=len(chances))

    def _add_product(self, name: str, what: str, vectors: Tensor) -> None:
        vectors = vectors.float()
        product = in_float64(vectors.T @ vectors)
        if not torch.isfinite(product).all():
            raise BadInput(
                f"the {what} at embedding {name} are not finite on the calibration data",
                remedy="use the model in a wider dtype, or leave the embedding out with `exclude`",
            )
        self._add(name, what, product, positions=len(vectors))

    def _add(self, name: str, what: str, values: Tensor, *, positions: int) -> None:
        self._sums[name, what] = self._sums[name, what] + values if (name, what) in self._sums else values
        self._positions[name, what] = self._positions.get((name, what), 0) + positions
