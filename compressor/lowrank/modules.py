"""Low-rank layers put in place of dense ones, in a tree of modules: with their hooks, and with heads that are tied.

The source of this module is copied into exported folders with that of the layers, so it imports nothing of this package
but what is copied too; and TorchScript compiles the layers, so annotations are evaluated.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.forms import LowRankEmbedding, QuantizedHead, layer_builder


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


class SameEmbedding(nn.Module):
    """Another place of an embedding, which holds nothing: it looks up in that."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is no part of this module

    @property
    def embedding(self) -> nn.Module:
        return self._embedding[0]

    @property
    def weight(self) -> Any:
        return self.embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.embedding(input)
        return found


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
    """Copy the hooks of the replaced dense layer, and the attributes that the new layer lacks.

    The hooks of `state_dict` are not among them.
    """
    carry_hooks(dense, layer)
    for name, value in vars(dense).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the hooks that run when a module is called to another module."""
    for name in _CALL_HOOKS:
        hooks = getattr(old, name)
        left = {key: hook for key, hook in hooks.items() if not isinstance(hook, _OF_WEIGHTS)}
        setattr(new, name, type(hooks)(left))
    new._is_full_backward_hook = old._is_full_backward_hook


def carry_state_hooks(dense: nn.Module, layer: nn.Module) -> None:
    """Copy the hooks that run when the dense layer is saved or loaded."""
    for name in _STATE_HOOKS:
        hooks = getattr(dense, name)
        setattr(layer, name, type(hooks)(hooks))
    own: Any = layer
    for each in dense._load_state_dict_pre_hooks.values():
        hook: Any = each
        register = own.register_load_state_dict_pre_hook if hook.with_module else own._register_load_state_dict_pre_hook
        register(hook.hook)


def remove_call_hooks(layer: nn.Module) -> None:
    """Remove the hooks from a layer that `carry_hooks` copied to another."""
    for name in _CALL_HOOKS:
        getattr(layer, name).clear()


def low_rank_layer(dense: nn.Module, form: str, rank: int) -> nn.Module:
    """An unfilled low-rank layer in place of a linear layer, a transformers `Conv1D`, a convolution or an embedding.

    On the dense layer's device, in its dtype, with its training flag, and as trainable. ValueError for other layers,
    for a convolution with groups, and for a layer that the form is not for.
    """
    layer = layer_builder(form)(dense, rank)
    layer.train(dense.training)
    trained = {
        name: tensor.requires_grad for name in ("weight", "bias") if (tensor := getattr(dense, name, None)) is not None
    }
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained["bias" if name.endswith("bias") else "weight"])
    return layer


def put_layer(root: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer at `name` in a module tree, and return the tree.

    The tree itself is changed, unless the root is the layer. AttributeError if there is no such name.
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


def head_of(embedding: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """A head tied to an embedding that is low-rank or quantized."""
    if isinstance(embedding, LowRankEmbedding) and isinstance(embedding.down, nn.Embedding):
        return TiedHead(embedding, bias)
    return QuantizedHead(embedding, bias)


def tie_head(root: nn.Module, head: str, embedding: str) -> None:
    """Put a head tied to the low-rank layer `embedding` in the place of the dense one, with the bias that it has.

    A transformers model is told, so that it loads and saves the two parameters once, and can tie them again.
    """
    dense = root.get_submodule(head)
    bias = dense.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    tied = head_of(root.get_submodule(embedding), bias).train(dense.training)
    shared = ("down", "up") if isinstance(tied, TiedHead) else ()
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
                factors = {f"{ours}.{factor}_weight": f"{source}.{factor}.weight" for factor in shared}
                setattr(module, name, others | factors)


def put_beside(root: nn.Module, name: str, places: list[str]) -> None:
    """Put what looks up in the low-rank or quantized embedding `name` in the other places that it has in a model.

    A transformers model is told that nothing is tied there any more, since nothing is stored there.
    """
    embedding = root.get_submodule(name)
    for place in places:
        put_layer(root, place, SameEmbedding(embedding))
    for above, module in root.named_modules():
        prefix = f"{above}." if above else ""
        tied = {f"{place.removeprefix(prefix)}.weight" for place in places}
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            declared = getattr(module, attribute, None)
            if isinstance(declared, dict) and tied & declared.keys():
                setattr(module, attribute, {target: of for target, of in declared.items() if target not in tied})


def is_of_transformers(root: nn.Module) -> bool:
    """Whether a model is one of transformers, which says what is tied in it."""
    return hasattr(root, "all_tied_weights_keys")


def put_pair(root: nn.Module, name: str, form: str, *, rank: int) -> nn.Module:
    """Put an unfilled low-rank layer in the place of a dense one and of a head tied to it, and return the tree.

    It takes all the places that the dense layer has in the tree. ValueError for a layer that cannot be factorized.
    """
    head, dense = tied_head(root, name), root.get_submodule(name)
    layer = low_rank_layer(dense, form, rank)
    carry_over(dense, layer)
    carry_state_hooks(dense, layer)
    places = [place for place, module in root.named_modules(remove_duplicate=False) if module is dense]
    for place in places:
        root = put_layer(root, place, layer)
    if head is not None:
        tie_head(root, head, name)
    if len(places) > 1 and isinstance(dense, nn.Embedding) and is_of_transformers(root):
        put_beside(root, name, [place for place in places if place != name])
    return root
