"""Layers belong to blocks by their names, and are in the order in which people count."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from compressor.planning import LayerPlan
from compressor.report.layer_groups import block_of, blocks_of, in_natural_order, kinds_by_name, kinds_of


def layer(name: str, kind: str = "linear") -> LayerPlan:
    return LayerPlan(name, (8, 8), kind, 2, "plain", 32, 0.1, "its share")


@given(st.lists(st.integers(0, 300), min_size=1, unique=True), st.randoms())
def test_two_comes_before_ten(numbers: list[int], order: random.Random) -> None:
    names = [f"model.layers.{number}.up" for number in sorted(numbers)]
    shuffled = [layer(name) for name in names]
    order.shuffle(shuffled)
    assert [each.name for each in in_natural_order(shuffled)] == names


def test_names_of_any_form_have_an_order() -> None:
    names = ["", "2", "10", "a", "a.2", "a2b", "a10b", "a.٣", "²"]
    assert len(in_natural_order([layer(name) for name in names])) == len(names)


def test_a_block_is_the_name_up_to_its_first_number() -> None:
    assert block_of("model.layers.3.mlp.experts.7.up") == "model.layers.3"
    assert block_of("layer1.0.conv2") == "layer1.0"
    assert block_of("layers.4") == block_of("lm_head") == ""


def test_there_are_no_blocks_where_none_has_two_layers() -> None:
    assert blocks_of([layer("0"), layer("2"), layer("head")]) is None
    assert blocks_of([layer("0.a"), layer("0.b"), layer("head")]) == ["0", "0", ""]


def test_a_kind_is_a_name_without_its_numbers() -> None:
    layers = [layer(f"layer{i}.{j}.conv{k}") for i in (1, 2) for j in (0, 1) for k in (1, 2)]
    assert set(kinds_of(layers)) == {f"layer{i}.*.conv{k}" for i in (1, 2) for k in (1, 2)}
    assert set(kinds_of(layers, most=3)) == {"layer*.*.conv1", "layer*.*.conv2"}


def test_numbers_that_tell_roles_apart_are_kept() -> None:
    """The two attentions of a block of diffusers, and what kohya's scripts call its blocks."""
    names = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn{k}.to_q" for i in range(3) for k in (1, 2)]
    assert len(set(kinds_by_name(names, most=24))) == 2
    flat = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    assert len(set(kinds_by_name(flat, most=24))) == 2
    assert kinds_by_name(["layers.0.fc_1", "layers.1.fc_2", "3"], most=24) == ["layers.*.fc_1", "layers.*.fc_2", "*"]


@given(st.lists(st.from_regex(r"[a-c]{0,2}[0-3]{0,2}(\.[a-c]{0,2}[0-3]{0,2}){0,3}", fullmatch=True)), st.integers(1, 9))
def test_fewer_kinds_are_unions_of_more(names: list[str], most: int) -> None:
    fine, coarse = kinds_by_name(names, most=len(names)), kinds_by_name(names, most=most)
    assert len(set(zip(fine, coarse, strict=True))) == len(set(fine))


def test_where_names_say_nothing_a_kind_is_what_the_layer_is() -> None:
    assert kinds_of([layer("0"), layer("2", "convolution")]) == ["linear", "convolution"]
    assert kinds_of([layer("stem", "convolution"), layer("head")]) == ["convolution", "linear"]
    many = [layer(f"blocks.{i}.{chr(97 + j)}") for i in range(3) for j in range(25)]
    assert set(kinds_of(many)) == {"linear"}
