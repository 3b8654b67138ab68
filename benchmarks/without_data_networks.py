"""The small networks of benchmarks/without_data.py: what they are, what they learn, and how well they do it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from compressor.data.builtin_data import digits, standard_library_files

# Share of the examples that nothing is trained on.
TESTED = 0.25

# The language model reads windows of this many bytes of the standard library's sources.
WINDOW = 64


@dataclass(frozen=True)
class Task:
    """Examples to train on and to measure on, and what a network's outputs for them are worth.

    `loss` is what is minimized and reported. `score` is larger for the better; it is `chance` for a network that has
    learned nothing.
    """

    trained: tuple[Tensor, ...]
    tested: tuple[Tensor, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    chance: float


@dataclass(frozen=True)
class Network:
    """A network, its task, and how it is trained: AdamW with a cosine schedule, or SGD with momentum."""

    name: str
    build: Callable[[], nn.Module]
    task: Callable[[int], Task]
    steps: int
    batch: int = 64
    rate: float = 3e-3
    decay: float = 1e-2
    sgd: bool = False


class Recurrent(nn.Module):
    """A recurrent network whose last state is classified."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(8, 64, num_layers=2, batch_first=True), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class VoiceDetector(nn.Module):
    """Whether somebody speaks in each chunk of a recording.

    The magnitudes of a short-time Fourier transform, which is a convolution that is not trained, go through four
    convolutions over time to a cell that remembers, as in common voice detectors.
    """

    def __init__(self, window: int = 128) -> None:
        super().__init__()
        self.transform = nn.Conv1d(1, window + 2, window, window // 2, bias=False)
        angles = 2 * math.pi * torch.outer(torch.arange(window // 2 + 1), torch.arange(window)) / window
        basis = torch.hann_window(window) * torch.cat([angles.cos(), angles.sin()])
        self.transform.weight = nn.Parameter(basis[:, None], requires_grad=False)
        sides = ((window // 2 + 1, 64, 1), (64, 48, 2), (48, 48, 2), (48, 64, 1))
        self.encoder = nn.Sequential(
            *(layer for d_in, d_out, stride in sides for layer in (nn.Conv1d(d_in, d_out, 3, stride, 1), nn.ReLU()))
        )
        self.cell, self.head = nn.LSTMCell(64, 64), nn.Linear(64, 1)

    def forward(self, chunks: Tensor) -> Tensor:
        batch, count, samples = chunks.shape
        real, imaginary = self.transform(chunks.reshape(-1, 1, samples)).chunk(2, 1)
        encoded = self.encoder((real.square() + imaginary.square() + 1e-9).sqrt()).mean(2).view(batch, count, -1)
        state, outputs = None, []
        for chunk in encoded.unbind(1):
            state = self.cell(chunk, state)
            outputs.append(self.head(state[0].relu()))
        return torch.cat(outputs, 1)


class Residual(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Conv2d(channels, outputs, 1, stride, bias=False) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.body(x)).relu()


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.query_key_value, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.query_key_value(self.norm1(x)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """The sixteen patches of 2 x 2 pixels of a digit are its tokens."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.1 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class LanguageModel(nn.Module):
    """The next byte of a text."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.words, self.position = nn.Embedding(128, width), nn.Parameter(0.1 * torch.randn(WINDOW, width))
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(text) + self.position)))


class Autoencoder(nn.Module):
    """A digit through sixteen numbers, by convolutions and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 16),
        )
        self.decoder = nn.Sequential(
            nn.Linear(16, 256),
            nn.Unflatten(1, (64, 2, 2)),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


class Generator(nn.Module):
    """A digit from its class and 16 numbers of noise, by transposed convolutions with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(26, 256),
            nn.Unflatten(1, (64, 2, 2)),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 48, 4, 2, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.ConvTranspose2d(48, 1, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)


def perceptron() -> nn.Sequential:
    sides = ((64, 192), (192, 192), (192, 96), (96, 10))
    layers = [layer for side in sides for layer in (nn.Linear(*side), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def perceptron_with_unused_inputs() -> nn.Module:
    """Pixels that are zero in all images have large weights, which training does not change and nothing notices."""
    model = perceptron()
    unused = images()[0].flatten(1).amax(0) == 0
    first = model[1].weight
    with torch.no_grad():
        first[:, unused] = 5 * first.norm(dim=1, keepdim=True)
    return model


def normalized_perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in ((64, 192), (192, 192), (192, 96)):
        layers += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(96, 10))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, outputs in ((1, 32), (32, 32), (0, 0), (32, 64), (64, 64), (0, 0)):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()] if outputs else [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def resnet() -> nn.Module:
    stem = (nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = (Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 64, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(-1) == labels).double().mean())


def balanced_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The mean of how much speech and how much silence is found."""
    found = (outputs > 0) == (labels > 0.5)
    return float((found[labels > 0.5].double().mean() + found[labels <= 0.5].double().mean()) / 2)


def explained(outputs: Tensor, targets: Tensor) -> float:
    """The share of the targets' variance that the outputs explain."""
    return 1 - float((outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def split(inputs: Tensor, targets: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    count = int(TESTED * len(inputs))
    tested, trained = order[:count], order[count:]
    return (inputs[trained], targets[trained]), (inputs[tested], targets[tested])


@cache
def images() -> tuple[Tensor, Tensor]:
    """All digits, with their labels."""
    parts = [digits(split) for split in ("train", "validation", "test")]
    pictures, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return pictures, labels


def classified_digits(seed: int) -> Task:
    trained, tested = split(*images(), seed)
    return Task(trained, tested, nn.functional.cross_entropy, accuracy, 0.1)


def raw_digits(seed: int) -> Task:
    """Pixels as they were scanned, from 0 to 16: neither scaled nor centered."""
    task = classified_digits(seed)
    (inputs, labels), (tested, truth) = task.trained, task.tested
    return replace(task, trained=(16 * inputs, labels), tested=(16 * tested, truth))


def copied_digits(seed: int) -> Task:
    pictures = images()[0]
    trained, tested = split(pictures, pictures, seed)
    return Task(trained, tested, nn.functional.mse_loss, explained, 0.0)


def drawn_digits(seed: int) -> Task:
    """Digits from their class and a code of 16 numbers, which is what a generator has to be inverted from."""
    pictures, labels = images()
    generator = torch.Generator().manual_seed(seed)
    flat = pictures.flatten(1)
    directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:16]
    code = (flat - flat.mean(0)) @ directions.T
    code = code / code.std(0) + 0.05 * torch.randn(code.shape, generator=generator)
    inputs = torch.cat([nn.functional.one_hot(labels, 10).float(), code], 1)
    trained, tested = split(inputs, (pictures - pictures.min()) / (pictures.max() - pictures.min()), seed)
    return Task(trained, tested, nn.functional.mse_loss, explained, 0.0)


def sequences(seed: int) -> Task:
    """Which of eight movements, begun at any time and in noise, a sequence of 8 numbers a step makes."""
    generator = torch.Generator().manual_seed(seed)
    count, steps = 3000, 24
    rates, phases = torch.rand(8, 8, generator=generator) * 0.9 + 0.1, torch.rand(8, 8, generator=generator) * 6.3
    labels = torch.randint(0, 8, (count,), generator=generator)
    begun = 10 * torch.rand(count, 1, 1, generator=generator)
    time = torch.arange(steps).view(1, -1, 1) + begun
    clean = torch.sin(time * rates[labels][:, None] + phases[labels][:, None])
    trained, tested = split(clean + 0.9 * torch.randn(clean.shape, generator=generator), labels, seed)
    return Task(trained, tested, nn.functional.cross_entropy, accuracy, 0.125)


def speech(seed: int) -> Task:
    """Recordings of ten chunks of 320 samples: voices are harmonics of a moving pitch, all else is colored noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count, chunks, samples = 1200, 10, 320
    length = chunks * samples
    time = torch.arange(length) / 8000
    glide = 1 + 0.15 * torch.sin(2 * math.pi * (2 * uniform(count, 1) + 1) * time + 6.3 * uniform(count, 1))
    phase = 2 * math.pi * torch.cumsum((90 + 160 * uniform(count, 1)) * glide / 8000, 1)
    harmonics = sum(uniform(count, 1) / order * torch.sin(order * phase) for order in range(1, 12))
    begin, duration = chunks * uniform(count, 1), 2 + 6 * uniform(count, 1)
    talking = ((torch.arange(chunks) >= begin) & (torch.arange(chunks) < begin + duration)).float()
    white = torch.randn(count, length, generator=generator)
    color = torch.fft.rfft(white) * (torch.arange(length // 2 + 1) + 20) ** (-uniform(count, 1))
    noise = torch.fft.irfft(color, length)
    noise = noise / noise.std(1, keepdim=True) * 0.3 * uniform(count, 1)
    sound = noise + (0.1 + 0.4 * uniform(count, 1)) * harmonics * talking.repeat_interleave(samples, 1)
    trained, tested = split(sound.view(count, chunks, samples), talking, seed)
    return Task(trained, tested, nn.functional.binary_cross_entropy_with_logits, balanced_accuracy, 0.5)


def source_text(seed: int) -> Task:
    """Windows of sources of the standard library, as ASCII; the score is the share of the single bytes' entropy won."""
    paths = standard_library_files("train")
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths[:40])
    ids = torch.tensor([min(ord(letter), 127) for letter in text])
    windows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    trained, tested = split(windows[:, :-1], windows[:, 1:], seed)
    tested = (tested[0][:256], tested[1][:256])
    shares = torch.bincount(trained[1].flatten(), minlength=128).double() + 1
    entropy = float(-(shares / shares.sum()).log()[tested[1].flatten()].mean())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def score(outputs: Tensor, targets: Tensor) -> float:
        return 1 - float(loss(outputs.double(), targets)) / entropy

    return Task(trained, tested, loss, score, 0.0)


NETWORKS = (
    Network("perceptron", perceptron, classified_digits, steps=1500),
    Network("perceptron, SGD", perceptron, classified_digits, steps=1500, rate=0.05, decay=1e-3, sgd=True),
    Network("perceptron, batch norm", normalized_perceptron, classified_digits, steps=1000),
    Network("perceptron, unused inputs", perceptron_with_unused_inputs, classified_digits, steps=1000),
    Network("VGG", vgg, classified_digits, steps=400, rate=1e-3),
    Network("ResNet", resnet, classified_digits, steps=250, rate=2e-3),
    Network("LSTM", lambda: Recurrent(nn.LSTM), sequences, steps=350),
    Network("GRU", lambda: Recurrent(nn.GRU), sequences, steps=350),
    Network("voice detector", VoiceDetector, speech, steps=300, batch=32, rate=2e-3),
    Network("perceptron, raw pixels", perceptron, raw_digits, steps=1500, rate=1e-3),
    Network("VGG, raw pixels", vgg, raw_digits, steps=400, rate=1e-3),
    Network("autoencoder", Autoencoder, copied_digits, steps=800, rate=2e-3),
    Network("generator", Generator, drawn_digits, steps=800, rate=2e-3),
    Network("language model", LanguageModel, source_text, steps=450, batch=24),
    Network("vision transformer", VisionTransformer, classified_digits, steps=500, rate=2e-3),
)


def trained(network: Network, task: Task, seed: int) -> nn.Module:
    """The network after its training, in evaluation mode."""
    torch.manual_seed(seed)
    model = network.build()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer: torch.optim.Optimizer
    if network.sgd:
        optimizer = torch.optim.SGD(parameters, network.rate, momentum=0.9, weight_decay=network.decay)
    else:
        optimizer = torch.optim.AdamW(parameters, network.rate, weight_decay=network.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.rate, total_steps=network.steps, pct_start=0.1)
    inputs, targets = task.trained
    for _ in range(network.steps):
        rows = torch.randint(0, len(inputs), (network.batch,))
        optimizer.zero_grad()
        task.loss(model(inputs[rows]), targets[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, task: Task) -> tuple[float, float]:
    """Loss and score on the examples that nothing was trained on."""
    inputs, targets = task.tested
    outputs = model(inputs)
    return float(task.loss(outputs, targets)), task.score(outputs, targets)
