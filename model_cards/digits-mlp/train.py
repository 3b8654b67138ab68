"""Trains digits-mlp from nothing: a perceptron whose hidden layer provably forgets all but its last steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.data.builtin_data import digits

FOLDER = Path(__file__).resolve().parent
EPSILON = 0.1  # the share of a weight matrix that is left out of its effective rank


@dataclass(frozen=True)
class Settings:
    """What the sweep varies; the defaults are within a point of its best, which is wider and so a larger file."""

    width: int = 768
    learning_rate: float = 0.15
    weight_decay: float = 0.0347
    max_gradient_norm: float = 4.0  # 0: not clipped
    steps: int = 3000
    milestones: tuple[int, ...] = (2520, 2720, 2880)
    factor: float = 0.5
    candidates: int = 16  # examples drawn for each step, of which it is taken on the one with the largest loss
    standardized: bool = True
    seed: int = 0

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every step, after `torch.optim.lr_scheduler.MultiStepLR`."""
        return [
            self.learning_rate * self.factor ** sum(step >= milestone for milestone in self.milestones)
            for step in range(self.steps)
        ]

    def memory_window(self) -> int:
        """Return the steps after which at most a share of 0.1 of the weights before them is left.

        The smallest n with `prod(1 - lr_t * wd) <= 0.1` over the last n steps (Galanti et al. 2022,
        arXiv:2206.05794, Lemma 3.2, with their lambda half of PyTorch's weight decay).
        """
        left = 1.0
        for count, rate in enumerate(reversed(self.learning_rates()), start=1):
            left *= 1 - rate * self.weight_decay
            if left <= EPSILON:
                return count
        raise ValueError("the training is shorter than its memory")

    def forgetting_exponent(self) -> float:
        """Return K: a share of exp(-K) of the initial weights is still in the trained ones."""
        return -sum(math.log(1 - rate * self.weight_decay) for rate in self.learning_rates())


def build_model(width: int = Settings.width, standardized: bool = Settings.standardized) -> nn.Sequential:
    """Return the untrained model: `(N, 1, 8, 8)` images in, `(N, 10)` logits out.

    The normalization has no weights: it holds the mean and variance of the training images' pixels.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.BatchNorm1d(64, eps=0.01, affine=False) if standardized else nn.Identity(),
        nn.Linear(64, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 10, bias=False),
    )


def candidates(count: int, settings: Settings) -> Iterator[Tensor]:
    """Yield for every step the indices to choose from, pass after pass over `count` examples in new orders."""
    generator = torch.Generator().manual_seed(settings.seed)
    step = 0
    while True:
        for drawn in torch.randperm(count, generator=generator).split(settings.candidates):
            if step == settings.steps:
                return
            yield drawn
            step += 1


def train(settings: Settings) -> tuple[nn.Sequential, list[float]]:
    """Return the trained model, and by how much each matrix outweighed itself one memory window before the end.

    The latter is `||W_{T-n}|| / ||W_T||` in the Frobenius norm: the residual of the rank bound is 0.1 of it.
    Steps are plain SGD at batch size one, on the candidate with the largest loss (Ordered SGD, Kawaguchi & Lu
    2020, arXiv:1907.04371, with q = 1): the weights remember fewer steps than there are examples, so none
    may be spent on an example that is already right.
    """
    torch.manual_seed(settings.seed)
    images, labels = digits("train")
    model = build_model(settings.width, settings.standardized)
    # The statistics of the whole training split, and never those of a batch of one: the model stays in eval.
    model.eval()
    if settings.standardized:
        pixels = images.flatten(1)
        model[1].running_mean.copy_(pixels.mean(0))
        model[1].running_var.copy_(pixels.var(0, correction=0))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, momentum=0.0
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.milestones, settings.factor)
    window_start = settings.steps - settings.memory_window()
    earlier: list[float] = []
    for step, drawn in enumerate(candidates(len(labels), settings)):
        if step == window_start:
            earlier = [float(weight.detach().norm()) for weight in model.parameters()]
        with torch.no_grad():
            losses = nn.functional.cross_entropy(model(images[drawn]), labels[drawn], reduction="none")
        chosen = drawn[losses.argmax(keepdim=True)]
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        if settings.max_gradient_norm:
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        optimizer.step()
        schedule.step()
    later = [float(weight.detach().norm()) for weight in model.parameters()]
    return model, [before / after for before, after in zip(earlier, later, strict=True)]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is at their label."""
    return float((model(images).argmax(dim=1) == labels).double().mean())


def frobenius_rank(singular_values: Tensor) -> int:
    """Return the least rank that leaves out at most 0.1 of the Frobenius norm."""
    energy = singular_values.double().square()
    left_out = energy.sum() - energy.cumsum(0)
    return 1 + int((left_out > EPSILON**2 * energy.sum()).sum())


@torch.no_grad()
def truncated(model: nn.Sequential, settings: Settings) -> tuple[nn.Sequential, dict[str, object]]:
    """Return the model cut to what it learned, and what that leaves.

    Each matrix keeps `min(singular values above the edge of the surviving initialization, Frobenius 0.1-rank)`
    singular values, where that is smaller than the matrix.
    """
    cut = build_model(settings.width, settings.standardized).eval()
    cut.load_state_dict(model.state_dict())
    layers = []
    before = after = 0
    for weight in cut.parameters():
        rows, columns = weight.shape
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        # nn.Linear draws from a uniform distribution of this standard deviation
        deviation = 1 / math.sqrt(3 * columns)
        edge = math.exp(-settings.forgetting_exponent()) * deviation * (math.sqrt(rows) + math.sqrt(columns))
        above, effective = int((edge < S).sum()), frobenius_rank(S)
        rank = max(1, min(above, effective))
        smaller = rank * (rows + columns) < weight.numel()
        if smaller:
            weight.copy_((U[:, :rank] * S[:rank]) @ Vh[:rank])
        before += weight.numel()
        after += rank * (rows + columns) if smaller else weight.numel()
        layers.append(
            {
                "shape": [rows, columns],
                "frobenius_rank": effective,
                "above_initialization_edge": above,
                "rank_kept": rank if smaller else None,
            }
        )
    return cut, {"layers": layers, "parameters_kept": after / before}


def main() -> None:
    """Train, measure, and write the folder."""
    sys.path.append(str(FOLDER.parent))
    from card import Card, Result, write_card

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    settings = Settings()
    model, norm_ratios = train(settings)
    path = FOLDER / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600

    accuracies = {split: accuracy(model, *digits(split)) for split in ("train", "validation", "test")}
    cut, truncation = truncated(model, settings)
    window = settings.memory_window()
    bound = window  # every step adds a matrix of rank one
    hidden = truncation["layers"][1]
    after = {split: accuracy(cut, *digits(split)) for split in ("validation", "test")}
    write_card(
        FOLDER,
        Card(
            name=FOLDER.name,
            summary=f"""
A perceptron with two hidden layers of {settings.width} units that reads handwritten digits, trained by plain
SGD on one example at a time with strong weight decay.
""",
            intended_use="""
A reference for what the training hyperparameters say about rank: here they bound the rank of the hidden matrix
below its size, which hardly any training recipe does. Not the way to read digits well.
""",
            data=f"""
The 1797 digits of the UCI repository as scikit-learn carries them, 8 x 8 pixels in [0, 1]:
`compressor.data.builtin_data.digits` puts 60 % into training, 20 % into validation, 20 % into the test.
Each step of training draws {settings.candidates} of the {len(digits("train")[1])} training images and learns from
the one with the largest loss.
""",
            task="image-classification",
            dataset=("builtin:digits", "UCI handwritten digits"),
            libraries=("torch",),
            tags=("mlp", "sgd", "weight-decay", "low-rank", "reference-model"),
            hyperparameters={
                "learning_rate": settings.learning_rate,
                "train_batch_size": 1,
                "eval_batch_size": len(digits("test")[1]),
                "seed": settings.seed,
                "gradient_accumulation_steps": 1,
                "total_train_batch_size": 1,
                "optimizer": "Use OptimizerNames.SGD with optimizer_args=momentum=0.0",
                "lr_scheduler_type": "step",
                "step_milestones": list(settings.milestones),
                "step_factor": settings.factor,
                "training_steps": settings.steps,
                "weight_decay": settings.weight_decay,
                "momentum": 0.0,
                "max_grad_norm": settings.max_gradient_norm,
                "dataset_size": len(digits("train")[1]),
                "sequence_length": 1,
                "undecayed": [],
            },
            results=(Result("accuracy", "accuracy", *accuracies.values(), digits=4),),
            parameters=sum(weight.numel() for weight in model.parameters()),
            notes=f"""
### Memory and rank

Weight decay leaves at most a tenth of the weights of {window} steps before the end in the final ones, and each step
adds a matrix of rank one. So the hidden matrix, {settings.width} x {settings.width}, is within
0.1 x {norm_ratios[1]:.3f} of its norm of a matrix of rank {bound}; the second factor is its norm then over its norm
now. The measured rank at a tolerance of 0.1 in the Frobenius norm is {hidden["frobenius_rank"]}: the bound holds, and
is far from tight. Of the initial weights, a share of {math.exp(-settings.forgetting_exponent()):.1e} is left.

Each matrix cut to the singular values above the edge of that remainder, and to no more than the tolerance of 0.1 needs,
the model keeps {truncation["parameters_kept"]:.1%} of its parameters; its accuracy is then {after["validation"]:.4f} on
the validation split and {after["test"]:.4f} on the test split.

`sweep.json` has the settings that were tried, each with the least weight decay at which the bound says something, and
`sweep.py` tries them. Memory this short is what limits the accuracy: the fewer steps are remembered, the more each has
to teach.
""",
        ),
        extra_figures={
            "epsilon": EPSILON,
            "memory_window": window,
            "rank_bound": bound,
            "forgetting_exponent": settings.forgetting_exponent(),
            "norm_ratios": norm_ratios,
            "truncated": {**truncation, "accuracy": after},
        },
    )


if __name__ == "__main__":
    main()
