"""Low-rank layers as torch modules: each a pair of ordinary layers, `down` and `up`, in place of a dense one.

Every one registers a persistent zero-size buffer `weight`. A loader that expects the dense layer then meets a shape
mismatch and stops, instead of filling the layer with random numbers; and code that asks for `weight.dtype` or
`weight.device` goes on working.

They take their input under the name that it has in PyTorch's own. The source of this module is copied into exported
folders, so it imports nothing of this package; and TorchScript compiles the layers, so annotations are evaluated.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# The shape of the zero-size `weight`, by the kind of the dense layer. Most store the matrix that they apply; of those
# that store its transpose it has to be known, because the factors of a square matrix look the same.
MARKERS: dict[str, tuple[int, ...]] = {
    "linear": (0,),
    "convolution": (0,),
    "parameter": (0,),
    "transposed linear": (0, 1),
    "transposed convolution": (0, 1),
    "embedding": (0, 0),
}


def _unfilled(kind: type[nn.Module], *arguments: Any, device: torch.device, **keywords: Any) -> nn.Module:
    """A module whose parameters have memory but no values yet."""
    return kind(*arguments, device="meta", **keywords).to_empty(device=device)


class LowRankLinear(nn.Module):
    """A plain pair: `y = up(down(x))`, with `down` of `r x d_in` and `up` of `d_out x r` and the bias."""

    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor, kind: str = "linear"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = _unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = _unfilled(nn.Linear, rank, out_features, bias=bias, **factory)
        self.register_buffer("weight", torch.empty(MARKERS[kind], **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """A pivoted pair: r rows of the matrix (`down`) and the other rows' coefficients in them (`up`), put in `order`."""

    weight: Tensor
    order: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor, kind: str = "linear"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = _unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = _unfilled(nn.Linear, rank, out_features - rank, bias=False, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_buffer("order", torch.empty(out_features, dtype=torch.int32, device=like.device))
        self.register_buffer("weight", torch.empty(MARKERS[kind], **factory))

    def forward(self, input: Tensor) -> Tensor:
        rows = self.down(input)
        y = torch.cat([rows, self.up(rows)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _copy_geometry(dense: Convolution | TransposedConvolution, pair: nn.Module) -> None:
    """Say of a pair what the dense convolution says of itself: models compute lengths of their outputs from it."""
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        setattr(pair, name, getattr(dense, name))


class LowRankConvolution(nn.Module):
    """A channel pair: a convolution to r channels with the dense one's kernel, then a 1 x 1 convolution with its
    bias."""

    weight: Tensor

    def __init__(self, dense: Convolution, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        _copy_geometry(dense, self)
        kind = type(dense)
        self.down = _unfilled(
            kind,
            dense.in_channels,
            rank,
            dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            padding_mode=dense.padding_mode,
            bias=False,
            **factory,
        )
        self.up = _unfilled(kind, rank, dense.out_channels, 1, bias=dense.bias is not None, **factory)
        self.register_buffer("weight", torch.empty(MARKERS["convolution"], **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


class LowRankTransposedConvolution(nn.Module):
    """The channel pair of a transposed convolution: a `1 x 1` one to r channels, then one with the dense one's kernel
    and bias."""

    weight: Tensor

    def __init__(self, dense: TransposedConvolution, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        _copy_geometry(dense, self)
        self.output_padding = dense.output_padding
        kind = type(dense)
        self.down = _unfilled(kind, dense.in_channels, rank, 1, bias=False, **factory)
        self.up = _unfilled(
            kind,
            rank,
            dense.out_channels,
            dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            output_padding=dense.output_padding,
            dilation=dense.dilation,
            bias=dense.bias is not None,
            **factory,
        )
        self.register_buffer("weight", torch.empty(MARKERS["transposed convolution"], **factory))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.up(self.down(input), output_size)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


class SpatialConvolution(nn.Module):
    """A spatial pair: a `k_h x 1` convolution to r channels, then a `1 x k_w` one with the bias.

    Each takes its own axis of the dense one's stride, padding and dilation, and both its padding mode. The first works
    on the columns one by one, so whether these are padded before or after it is the same in every mode.
    """

    weight: Tensor

    def __init__(self, dense: nn.Conv2d, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        _copy_geometry(dense, self)
        padding, mode = dense.padding, dense.padding_mode
        vertical, horizontal = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        self.down = _unfilled(
            nn.Conv2d,
            dense.in_channels,
            rank,
            (dense.kernel_size[0], 1),
            stride=(dense.stride[0], 1),
            padding=vertical,
            dilation=(dense.dilation[0], 1),
            padding_mode=mode,
            bias=False,
            **factory,
        )
        self.up = _unfilled(
            nn.Conv2d,
            rank,
            dense.out_channels,
            (1, dense.kernel_size[1]),
            stride=(1, dense.stride[1]),
            padding=horizontal,
            dilation=(1, dense.dilation[1]),
            padding_mode=mode,
            bias=dense.bias is not None,
            **factory,
        )
        self.register_buffer("weight", torch.empty(MARKERS["convolution"], **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


class LowRankEmbedding(nn.Module):
    """The pair of an embedding: `y = up(down(token))`, with `down` of `tokens x r` and `up` of `d x r`."""

    weight: Tensor

    def __init__(self, dense: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = dense.num_embeddings, dense.embedding_dim, rank
        self.padding_idx = dense.padding_idx
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.down = _unfilled(
            nn.Embedding,
            dense.num_embeddings,
            rank,
            padding_idx=dense.padding_idx,
            scale_grad_by_freq=dense.scale_grad_by_freq,
            sparse=dense.sparse,
            **factory,
        )
        self.up = _unfilled(nn.Linear, rank, dense.embedding_dim, bias=False, **factory)
        self.register_buffer("weight", torch.empty(MARKERS["embedding"], **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, rank={self.rank}"


class TiedHead(nn.Module):
    """An output head that is tied to a low-rank embedding: `y = down_weight (up_weight^T h) + bias`.

    Its two weights are those of the embedding's `down` and `up`, the same parameters. The bias is the dense head's.
    """

    weight: Tensor

    def __init__(self, embedding: LowRankEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.down_weight, self.up_weight = embedding.down.weight, embedding.up.weight
        self.bias = bias
        # Nothing is stored for a head that is tied, so nothing is to be missed; transformers makes the bias as long as
        # the weight has rows when it ties it.
        self.register_buffer("weight", embedding.weight.new_empty(self.out_features, 0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        down, up = self.down_weight, self.up_weight
        assert isinstance(down, Tensor)
        assert isinstance(up, Tensor)
        return nn.functional.linear(nn.functional.linear(input, up.T), down, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# What PyTorch calls before, in and after a layer's forward and backward pass, in the attributes of a module: the hooks
# in their order, by a number that the others give the kind of.
_CALL_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")
# Hooks that compute the weight itself.
_OF_WEIGHTS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def carry_over(dense: nn.Module, layer: nn.Module) -> None:
    """Give a layer the hooks of the dense one in whose place it is called, and the attributes that it has not itself.

    The hooks of `state_dict` are not among them.
    """
    carry_hooks(dense, layer)
    for name, value in vars(dense).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks that run when another one is called."""
    for name in _CALL_HOOKS:
        hooks = getattr(old, name)
        left = {key: hook for key, hook in hooks.items() if not isinstance(hook, _OF_WEIGHTS)}
        setattr(new, name, type(hooks)(left))
    new._is_full_backward_hook = old._is_full_backward_hook


def carry_state_hooks(dense: nn.Module, layer: nn.Module) -> None:
    """Give a layer the hooks that the dense one has on being saved and loaded."""
    for name in _STATE_HOOKS:
        hooks = getattr(dense, name)
        setattr(layer, name, type(hooks)(hooks))
    own: Any = layer
    for each in dense._load_state_dict_pre_hooks.values():
        hook: Any = each
        register = own.register_load_state_dict_pre_hook if hook.with_module else own._register_load_state_dict_pre_hook
        register(hook.hook)


def remove_call_hooks(layer: nn.Module) -> None:
    """Take from a layer the hooks that `carry_hooks` gave to another."""
    for name in _CALL_HOOKS:
        getattr(layer, name).clear()


def low_rank_layer(dense: nn.Module, form: str, rank: int) -> nn.Module:
    """An unfilled low-rank layer in place of a linear layer, a transformers `Conv1D`, a convolution or an embedding.

    On the dense layer's device, in its dtype, with its training flag, and as trainable. ValueError for other layers,
    for a convolution with groups, and for a spatial pair of anything but a two-dimensional convolution.
    """
    layer: nn.Module
    if isinstance(dense, Convolution | TransposedConvolution) and dense.groups > 1:
        raise ValueError(f"the convolution has {dense.groups} groups")
    if form == "spatial":
        if not isinstance(dense, nn.Conv2d):
            raise ValueError(f"{type(dense).__name__} is not a two-dimensional convolution")
        layer = SpatialConvolution(dense, rank)
    elif isinstance(dense, Convolution):
        layer = LowRankConvolution(dense, rank)
    elif isinstance(dense, TransposedConvolution):
        layer = LowRankTransposedConvolution(dense, rank)
    elif type(dense) is nn.Embedding and dense.max_norm is None:
        layer = LowRankEmbedding(dense, rank)
    else:
        weight = dense.weight
        assert isinstance(weight, Tensor)
        if isinstance(dense, nn.Linear):
            kind, sides = "linear", (dense.in_features, dense.out_features)
        elif type(dense).__name__ == "Conv1D":
            kind, sides = "transposed linear", (weight.shape[0], weight.shape[1])
        else:
            raise ValueError(f"{type(dense).__name__} is not a layer that can be factorized")
        pair = PivotedLinear if form == "pivoted" else LowRankLinear
        has_bias = getattr(dense, "bias", None) is not None
        layer = pair(*sides, rank, bias=has_bias, like=weight, kind=kind)
    layer.train(dense.training)
    trained = {
        name: tensor.requires_grad for name in ("weight", "bias") if (tensor := getattr(dense, name, None)) is not None
    }
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained["bias" if name.endswith("bias") else "weight"])
    return layer


def put_layer(root: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer in the place `name` of a module tree, and return the tree.

    The tree itself is changed, unless the root is the layer. AttributeError when there is no such place.
    """
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)
    return root


def tied_head(root: nn.Module, name: str) -> str | None:
    """The name of the linear layer whose weight is that of the embedding `name`; None where there is none.

    It is where both hold one parameter, and where a transformers model that is not filled yet says that they will.
    """
    embedding = root.get_submodule(name)
    if not isinstance(embedding, nn.Embedding):
        return None
    declared = getattr(root, "all_tied_weights_keys", {})
    modules: dict[str, nn.Module] = dict(root.named_modules())
    for other, module in modules.items():
        shared = getattr(module, "weight", None) is embedding.weight
        if isinstance(module, nn.Linear) and (shared or declared.get(f"{other}.weight") == f"{name}.weight"):
            return other
    return None


def tie_head(root: nn.Module, head: str, embedding: str) -> None:
    """Put a head tied to the low-rank layer `embedding` in the place of the dense one, with the bias that it has.

    A transformers model is told, so that it loads and saves the two parameters once, and can tie them again.
    """
    pair = root.get_submodule(embedding)
    assert isinstance(pair, LowRankEmbedding)
    dense = root.get_submodule(head)
    bias = dense.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    tied = TiedHead(pair, bias).train(dense.training)
    carry_over(dense, tied)
    carry_state_hooks(dense, tied)
    put_layer(root, head, tied)
    for place, module in root.named_modules():
        prefix = f"{place}." if place else ""
        ours, source = head.removeprefix(prefix), embedding.removeprefix(prefix)
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            declared = getattr(module, name, None)
            if isinstance(declared, dict) and declared.get(f"{ours}.weight") == f"{source}.weight":
                others = {target: tied for target, tied in declared.items() if target != f"{ours}.weight"}
                factors = {f"{ours}.{factor}_weight": f"{source}.{factor}.weight" for factor in ("down", "up")}
                setattr(module, name, others | factors)


def put_pair(root: nn.Module, name: str, form: str, *, rank: int) -> nn.Module:
    """Put an unfilled low-rank layer in the place of a dense one and of a head tied to it, and return the tree.

    It takes all the places that the dense layer has in the tree. ValueError for a layer that cannot be factorized.
    """
    head, dense = tied_head(root, name), root.get_submodule(name)
    layer = low_rank_layer(dense, form, rank)
    carry_over(dense, layer)
    carry_state_hooks(dense, layer)
    for place in [place for place, module in root.named_modules(remove_duplicate=False) if module is dense]:
        root = put_layer(root, place, layer)
    if head is not None:
        tie_head(root, head, name)
    return root
