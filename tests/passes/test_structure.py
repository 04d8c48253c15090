"""Nested values come apart into tensors and a structure, and back together."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch

from graphopt.passes.structure import flatten, map_tensors, tensor_names

Pair = namedtuple("Pair", ["first", "second"])  # the untyped form is what is tested


class Cache:
    """A plain object that nobody registered."""

    def __init__(self, keys: torch.Tensor, name: str) -> None:
        self.layers = [keys, keys + 1]
        self.name = name
        self.length: Any = 3


def nested() -> dict[str, Any]:
    return {
        "cache": Cache(torch.zeros(2), "first"),
        "pair": Pair(torch.ones(3), None),
        "ordered": OrderedDict(a=(torch.full((1,), 2.0), 5)),
        "flag": True,
    }


def test_a_value_is_rebuilt_around_other_tensors() -> None:
    value = nested()
    tensors, structure = flatten(value)
    assert [t.tolist() for t in tensors] == [[0, 0], [1, 1], [1, 1, 1], [2]]
    rebuilt = structure.rebuild([tensor + 10 for tensor in tensors])
    assert type(rebuilt["cache"]) is Cache
    assert rebuilt["cache"] is not value["cache"]
    assert rebuilt["cache"].name == "first"
    assert rebuilt["cache"].layers[1].tolist() == [11, 11]
    assert rebuilt["pair"] == Pair(rebuilt["pair"].first, None)
    assert isinstance(rebuilt["ordered"], OrderedDict)
    assert rebuilt["ordered"]["a"][1] == 5
    assert value["cache"].layers[0].tolist() == [0, 0]


def test_equal_forms_have_equal_structures() -> None:
    first, second, third = nested(), nested(), nested()
    second["cache"].layers[0] = torch.randn(7)
    third["cache"].name = "other"
    assert flatten(first)[1] == flatten(second)[1]
    assert flatten(first)[1] != flatten(third)[1]


def test_an_object_that_contains_itself_ends() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self
            self.value = 1

    node = Node()
    tensors, structure = flatten(node)
    assert tensors == []
    assert structure.rebuild([]) is node


def test_tensors_are_named_by_their_path() -> None:
    _, structure = flatten(nested())
    assert tensor_names(structure) == [
        "cache_layers_0",
        "cache_layers_1",
        "pair_0",
        "ordered_0_0",
    ]


def test_every_tensor_is_mapped() -> None:
    mapped = map_tensors(nested(), lambda tensor: tensor.shape[0])
    assert (mapped["cache"].layers, mapped["pair"].first) == ([2, 2], 3)
