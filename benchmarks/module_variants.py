"""Ways to compute a low-rank layer, and a Llama of them, timed beside the dense ones and beside what the package does.

    python benchmarks/module_variants.py [--device cpu|cuda] [--parts layers models] [--output FOLDER] [--quick]

`layers`: plain and pivoted pairs of square matrices, a variant a column, at a half and three quarters of the dense
matrix's numbers. `models`: a Llama of hidden 1024 with 4 blocks at half of the numbers of each layer, one token at a
time after a context of 32 tokens, and 128 tokens at once; with one wide `down` for layers that share an input, and with
orders folded into the layers that come next. Nothing of it is an option of the package: the variants that are not
faster are here so that this can be measured again elsewhere.

Ratios to the dense layer or model are medians over repeats in which all run in turn, in one thread; on the CPU of the
CPU time of the thread, on a GPU of the time until it has finished. Each variant is first compared with the pair by
calls of its modules: equal bit for bit where the arithmetic is the same, else within the rounding of the dtype. On a
GPU with Triton a kernel for `up` and the order is among them. Takes six minutes of one core, writes
benchmarks/results/module_variants-DEVICE.json, and prints its tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.forms import LowRankLinear, PivotedLinear
from compressor.forms.layers import columns_in_order
from compressor.latency.measure import device_name

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.float32, torch.bfloat16)
# What a dtype's rounding may make of a sum in another order, relative to the largest output.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

Layer = Callable[[Tensor], Tensor]
Document = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is timed, and how often."""

    widths: tuple[int, ...] = (256, 1024, 4096)
    rows: tuple[int, ...] = (1, 8, 32, 128, 2048)
    keeps: tuple[float, ...] = (0.5, 0.75)
    largest: float = 2e9  # numbers of a layer times rows, on a CPU
    hidden: int = 1024
    intermediate: int = 2816
    blocks: int = 4
    repeats: int = 9
    seconds: float = 0.01  # in which a call is repeated, so that the clock's steps do not matter


QUICK = Sizes(widths=(64,), rows=(1, 8), keeps=(0.5,), hidden=128, intermediate=352, blocks=1, repeats=1, seconds=0.0)


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, sizes: Sizes) -> list[float]:
    """Seconds of the first call, and of all others the median of their ratios to it, run in turn."""

    def seconds(call: Callable[[], Any], times: int) -> float:
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        began = clock()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - began) / times

    for call in calls:
        seconds(call, 2)
    counts = [max(1, round(sizes.seconds / max(seconds(call, 2), 1e-9))) for call in calls]
    turns = [[seconds(call, times) for call, times in zip(calls, counts, strict=True)] for _ in range(sizes.repeats)]
    ratios = [[each / turn[0] for each in turn[1:]] for turn in turns]
    return [statistics.median(turn[0] for turn in turns), *map(statistics.median, zip(*ratios, strict=True))]


@dataclass(frozen=True)
class Variant:
    """A way to compute a pair.

    Attributes:
        name: What it is called.
        layer: Computes it.
        exact: Whether its outputs are bit for bit those of the modules.
        extra_bytes: Memory that it takes beside the pair's own tensors, in units of these.
    """

    name: str
    layer: Layer
    exact: bool = True
    extra_bytes: float = 0.0


def plain_rank(d_in: int, d_out: int, keep: float) -> int:
    """The rank at which a plain pair has this share of the numbers of the matrix."""
    return max(1, round(keep * d_in * d_out / (d_in + d_out)))


def pivoted_rank(d_in: int, d_out: int, keep: float) -> int:
    """The rank at which a pivoted pair has this share of the numbers of the matrix."""
    both = d_in + d_out
    return max(1, round((both - math.sqrt(both**2 - 4 * keep * d_in * d_out)) / 2))


def filled(layer: LowRankLinear | PivotedLinear) -> LowRankLinear | PivotedLinear:
    """The layer with random values that keep the variance of its inputs."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if isinstance(layer, PivotedLinear):
        layer.order.copy_(torch.randperm(layer.out_features))
    return layer.requires_grad_(False).eval()


def plain_variants(pair: LowRankLinear) -> list[Variant]:
    """The ways to compute a plain pair, the calls of its modules first."""
    return [Variant("plain, by modules", ByModules(pair)), Variant("plain", pair)]


def pivoted_variants(pair: PivotedLinear) -> list[Variant]:
    """The ways to compute a pivoted pair without a bias, the calls of its modules first."""
    down, up, order, rank = pair.down.weight, pair.up.weight, pair.order, pair.rank
    places = order.argsort()
    first, second = places[:rank], places[rank:]
    identity = torch.eye(rank, dtype=down.dtype, device=down.device)
    expanded = torch.cat([identity, up])[order.long()].contiguous()

    def joined(x: Tensor) -> Tensor:
        rows = linear(x, down)
        return torch.cat([rows, linear(rows, up)], dim=-1)

    def one_buffer(x: Tensor) -> Tensor:
        y = x.new_empty(len(x), len(order))
        torch.mm(x, down.t(), out=y[:, :rank])
        torch.mm(y[:, :rank], up.t(), out=y[:, rank:])
        return y

    def gathered(y: Tensor) -> Tensor:
        return y.gather(-1, order.long().expand_as(y))

    def scattered(x: Tensor) -> Tensor:
        rows = linear(x, down)
        y, others = x.new_empty(len(x), len(order)), linear(rows, up)
        y.scatter_(-1, first.expand_as(rows), rows)
        return y.scatter_(-1, second.expand_as(others), others)

    def copied(x: Tensor) -> Tensor:
        rows = linear(x, down)
        y = x.new_empty(len(x), len(order))
        return y.index_copy_(-1, first, rows).index_copy_(-1, second, linear(rows, up))

    def turned(x: Tensor) -> Tensor:
        y = x.new_empty(len(order), len(x))
        torch.mm(down, x.t(), out=y[:rank])
        torch.mm(up, y[:rank], out=y[rank:])
        return y.index_select(0, order).t().contiguous()

    fused = fused_up() if down.is_cuda else None
    return [
        Variant("pivoted, by modules", ByModules(pair)),
        Variant("pivoted", pair),
        Variant("index_select", lambda x: joined(x).index_select(-1, order)),
        Variant("gather", lambda x: gathered(joined(x))),
        Variant("by way of float32", lambda x: joined(x).float().index_select(-1, order).to(x.dtype)),
        Variant("one buffer, index_select", lambda x: one_buffer(x).index_select(-1, order)),
        Variant("one buffer, gather", lambda x: gathered(one_buffer(x))),
        Variant("scatter", scattered),
        Variant("index_copy", copied),
        Variant("rows of the transpose", turned, exact=False),
        Variant(
            "plain of the same rank",
            lambda x: linear(linear(x, down), expanded),
            exact=False,
            extra_bytes=expanded.numel() / (down.numel() + up.numel()),
        ),
        *([Variant("fused up", lambda x: fused(linear(x, down), up, order), exact=False)] if fused else []),
    ]


def fused_up() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Triton's kernel for `up` and the order, where Triton is."""
    try:
        from fused_up import up_in_order
    except ImportError:
        return None
    return up_in_order  # type: ignore[no-any-return]


def measured_layers(device: torch.device, sizes: Sizes) -> list[Document]:
    """The ratios of all variants of square layers to dense ones."""
    rows = []
    for dtype, width, keep in product(DTYPES, sizes.widths, sizes.keeps):
        dense = nn.Linear(width, width, bias=False, dtype=dtype, device=device).requires_grad_(False)
        given: dict[str, Any] = {"bias": False, "like": dense.weight}
        plain = filled(LowRankLinear(width, width, plain_rank(width, width, keep), **given))
        pivoted = filled(PivotedLinear(width, width, pivoted_rank(width, width, keep), **given))
        groups = (plain_variants(plain), pivoted_variants(pivoted))
        for count in sizes.rows:
            if width * width * count > sizes.largest and device.type == "cpu":
                continue
            x = torch.randn(count, width, dtype=dtype, device=device)
            for group in groups:
                require_same(group, x)
            variants = [each for group in groups for each in group]
            calls = [partial(layer, x) for layer in (dense, *(each.layer for each in variants))]
            seconds, *ratios = medians(calls, device, sizes)
            row = {"dtype": str(dtype).removeprefix("torch."), "width": width, "keep": keep, "rows": count}
            named = {each.name: round(ratio, 3) for each, ratio in zip(variants, ratios, strict=True)}
            extra = {each.name: round(each.extra_bytes, 3) for each in variants if each.extra_bytes}
            rows.append(row | {"dense_microseconds": round(seconds * 1e6, 1), "ratios": named, "extra_bytes": extra})
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def require_same(variants: Sequence[Variant], x: Tensor) -> None:
    """Raise AssertionError unless all variants compute what the first one does."""
    expected = variants[0].layer(x)
    for each in variants[1:]:
        y = each.layer(x)
        off = float((y - expected).abs().max() / expected.abs().max())
        on_cpu = x.device.type == "cpu"  # elsewhere the number of columns may choose another kernel
        assert off <= (0.0 if each.exact and on_cpu else ROUNDING[x.dtype]), f"{each.name} is off by {off}"
        assert y.shape == expected.shape, each.name
        assert y.is_contiguous(), each.name


class WideDown:
    """One product for the `down` of layers that get the same input one after the other, the first of which asks."""

    def __init__(self, layers: Sequence[LowRankLinear | PivotedLinear]) -> None:
        self.weight = torch.cat([layer.down.weight for layer in layers])
        self.sizes = [len(layer.down.weight) for layer in layers]
        self.parts: list[Tensor] = []

    def part(self, number: int, x: Tensor) -> Tensor:
        """What the `down` of one of the layers gives."""
        if number == 0:
            self.parts = list(linear(x, self.weight).split(self.sizes, dim=-1))
        return self.parts[number]


class Behind(nn.Module):
    """A pair whose `down` is a part of a wide one."""

    def __init__(self, pair: LowRankLinear | PivotedLinear, wide: WideDown, number: int) -> None:
        super().__init__()
        self.pair, self.wide, self.number = pair, wide, number

    def forward(self, x: Tensor) -> Tensor:
        pair, rows = self.pair, self.wide.part(self.number, x)
        others = linear(rows, pair.up.weight)
        if isinstance(pair, LowRankLinear):
            return others
        return columns_in_order(torch.cat([rows, others], dim=-1), pair.order)


class Unordered(nn.Module):
    """A pivoted pair whose order is folded into the layer that comes next."""

    def __init__(self, pair: PivotedLinear) -> None:
        super().__init__()
        self.down, self.up = pair.down.weight, pair.up.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = linear(x, self.down)
        return torch.cat([rows, linear(rows, self.up)], dim=-1)


class ByHead(nn.Module):
    """The values of an attention, in an order in which each head has first those of `down` and then those of `up`.

    What moves is not a number at a time but what a head has of each. The order in a head is folded into `o_proj`.
    """

    def __init__(self, pair: PivotedLinear, heads: int) -> None:
        super().__init__()
        places = pair.order.argsort()  # where each computed column goes
        first, second = places[: pair.rank].sort(), places[pair.rank :].sort()
        self.down, self.up = pair.down.weight[first.indices], pair.up.weight[second.indices][:, first.indices]
        size = pair.out_features // heads
        self.firsts = torch.bincount(first.values // size, minlength=heads).tolist()
        self.seconds = torch.bincount(second.values // size, minlength=heads).tolist()
        parts = zip(first.values.split(self.firsts), second.values.split(self.seconds), strict=True)
        self.columns = torch.cat([part for pair_of_parts in parts for part in pair_of_parts])

    def forward(self, x: Tensor) -> Tensor:
        rows = linear(x, self.down)
        others = linear(rows, self.up)
        parts = zip(rows.split(self.firsts, dim=-1), others.split(self.seconds, dim=-1), strict=True)
        return torch.cat([part for pair in parts for part in pair], dim=-1)


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_pairs(dense: nn.Module, form: type[LowRankLinear] | type[PivotedLinear], keep: float) -> nn.Module:
    """A copy of a Llama with random pairs in the places of the linear layers of its blocks."""
    model: Any = copy.deepcopy(dense)
    for block in model.model.layers:
        for name in LINEAR:
            parent = block.self_attn if hasattr(block.self_attn, name) else block.mlp
            old = getattr(parent, name)
            sizes = (old.in_features, old.out_features)
            rank = (plain_rank if form is LowRankLinear else pivoted_rank)(*sizes, keep)
            setattr(parent, name, filled(form(*sizes, rank, bias=False, like=old.weight)))
    return model


class ByModules(nn.Module):
    """A pair that calls its parts, and then joins their outputs and puts them in order."""

    def __init__(self, pair: LowRankLinear | PivotedLinear) -> None:
        super().__init__()
        self.down, self.up = pair.down, pair.up
        self.order = pair.order if isinstance(pair, PivotedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.down(x)
        y: Tensor = self.up(rows)
        return y if self.order is None else torch.cat([rows, y], dim=-1).index_select(-1, self.order)


def by_modules(model: nn.Module) -> nn.Module:
    """A copy whose pairs call their parts."""
    copied: Any = copy.deepcopy(model)
    for block in copied.model.layers:
        for name in LINEAR:
            parent = block.self_attn if hasattr(block.self_attn, name) else block.mlp
            setattr(parent, name, ByModules(getattr(parent, name)))
    return copied


def with_wide_downs(model: nn.Module) -> nn.Module:
    """A copy in which q, k and v, and gate and up have one `down` each."""
    copied: Any = copy.deepcopy(model)
    for block in copied.model.layers:
        for parent, names in ((block.self_attn, LINEAR[:3]), (block.mlp, LINEAR[4:6])):
            layers = [getattr(parent, name) for name in names]
            wide = WideDown(layers)
            for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
                setattr(parent, name, Behind(layer, wide, number))
    return copied


def with_folded_orders(model: nn.Module) -> nn.Module:
    """A copy in which gate is not put in order, and up and the inputs of down are in gate's."""
    copied: Any = copy.deepcopy(model)
    for block in copied.model.layers:
        mlp = block.mlp
        columns = mlp.gate_proj.order.argsort()  # of the dense hidden states, in the order in which gate computes them
        mlp.up_proj.order = mlp.up_proj.order[columns]
        mlp.gate_proj = Unordered(mlp.gate_proj)
        mlp.down_proj.down.weight = nn.Parameter(mlp.down_proj.down.weight[:, columns].contiguous(), False)
    return copied


def with_values_by_head(model: nn.Module) -> nn.Module:
    """A copy in which v gives its heads in an order of their own, which o takes."""
    copied: Any = copy.deepcopy(model)
    for block in copied.model.layers:
        attention = block.self_attn
        attention.v_proj = ByHead(attention.v_proj, attention.config.num_key_value_heads)
        weight = attention.o_proj.down.weight
        attention.o_proj.down.weight = nn.Parameter(weight[:, attention.v_proj.columns].contiguous(), False)
    return copied


def llama(sizes: Sizes) -> nn.Module:
    """A Llama of random weights whose embedding and head are small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = sizes.hidden // 64
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.blocks,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=256,
        )
    )


def runner(model: Any, batch: int, length: int, *, context: int) -> Callable[[], Tensor]:
    """What runs a model on tokens, after a context whose keys and values are in a cache."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    ids = torch.randint(256, (batch, context + length), generator=generator).to(device)
    cache: Any = model(input_ids=ids[:, :context], use_cache=True).past_key_values if context else None

    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids[:, context:], past_key_values=cache, use_cache=context > 0).logits
        if cache is not None:
            cache.crop(-length)  # the tokens leave the cache again: every step is the same one
        return logits

    return run


def measured_models(device: torch.device, sizes: Sizes) -> list[Document]:
    """The ratios of a Llama's variants to the dense one."""
    rows = []
    for dtype in DTYPES:
        dense = llama(sizes).to(device, dtype).eval().requires_grad_(False)
        plain, pivoted = (with_pairs(dense, form, 0.5) for form in (LowRankLinear, PivotedLinear))
        plains = {"plain, by modules": by_modules(plain), "plain": plain, "plain, wide down": with_wide_downs(plain)}
        pivots = {
            "pivoted, by modules": by_modules(pivoted),
            "pivoted": pivoted,
            "pivoted, wide down": with_wide_downs(pivoted),
            "pivoted, gate's order folded": with_folded_orders(pivoted),
            "pivoted, values by head": with_values_by_head(pivoted),
        }
        for workload, batch, length, context in (("decode", 1, 1, 32), ("decode", 32, 1, 32), ("prefill", 1, 128, 0)):
            runs = {
                name: runner(model, batch, length, context=context)
                for name, model in ({"dense": dense} | plains | pivots).items()
            }
            for group in (plains, pivots):
                expected = runs[next(iter(group))]()
                for name in group:
                    off = float((runs[name]() - expected).abs().max() / expected.abs().max())
                    assert off < 10 * ROUNDING[dtype], f"{name} is off by {off}"
            seconds, *ratios = medians(list(runs.values()), device, sizes)
            named = {name: round(ratio, 3) for name, ratio in zip((*plains, *pivots), ratios, strict=True)}
            row = {"dtype": str(dtype).removeprefix("torch."), "workload": workload, "batch": batch}
            rows.append(row | {"dense_milliseconds": round(seconds * 1e3, 2), "ratios": named})
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


# The package's own ways and those before them; all others are variants that it does not use.
SHOWN = ("plain, by modules", "plain", "pivoted, by modules", "pivoted")


def layers_table(document: Document) -> str:
    """The layers at half of their numbers, with the fastest of the pivoted variants that the package does not use."""
    lines = [["dtype", "width", "rows", "dense, us", *SHOWN, "fastest other pivoted"]]
    for row in document["layers"]:
        if row["keep"] != 0.5:
            continue
        others = {name: ratio for name, ratio in row["ratios"].items() if name not in SHOWN}
        fastest = min(others, key=others.__getitem__)
        first = [row["dtype"], f"{row['width']}", f"{row['rows']}", f"{row['dense_microseconds']:.0f}"]
        lines.append([*first, *(f"{row['ratios'][name]:.2f}" for name in SHOWN), f"{others[fastest]:.2f} ({fastest})"])
    return _markdown(lines)


def models_table(document: Document) -> str:
    """The Llama in all variants."""
    names = list(document["models"][0]["ratios"])
    lines = [["dtype", "run", "batch", "dense, ms", *names]]
    for row in document["models"]:
        first = [row["dtype"], row["workload"], f"{row['batch']}", f"{row['dense_milliseconds']:.1f}"]
        lines.append([*first, *(f"{row['ratios'][name]:.2f}" for name in names)])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *rest])


PARTS = {"layers": measured_layers, "models": measured_models}
TABLES = {"layers": layers_table, "models": models_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = options.output / f"module_variants-{device.type}.json"
    document: Document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(device)}
    document["versions"] = versions
    with torch.inference_mode():
        for part in options.parts:
            document[part] = PARTS[part](device, QUICK if options.quick else Sizes())
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            sys.stdout.write(f"{TABLES[part](document)}\n\n")


if __name__ == "__main__":
    main()
