"""N-gram embeddings add one vector for each n-gram that ends at a token."""

from __future__ import annotations

import torch

from graphopt.kernels.ngram_embeddings import NgramEmbeddings


def filled(longest: int = 3, rows: int = 4096) -> NgramEmbeddings:
    """Return embeddings whose rows all differ."""
    module = NgramEmbeddings(4, orders=tuple(range(2, longest + 1)), rows=rows)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))
    return module


def reference(module: NgramEmbeddings, ids: list[int]) -> torch.Tensor:
    """Return the vectors of one sequence, token by token."""
    total = torch.zeros(len(ids), module.weight.shape[1])
    for place in range(len(ids)):
        for number, order in enumerate(module.orders):
            window = [ids[i] + 1 if i >= 0 else 0 for i in range(place, place - order, -1)]
            key = window[0]
            for token in window[1:]:
                key = (key * 36313 + token) % (2**31 - 1)
            total[place] += module.weight.detach()[number * module.rows + key % module.rows]
    return total


def test_vectors_are_those_of_the_reference() -> None:
    module = filled(longest=4)
    ids = torch.randint(0, 50000, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([reference(module, row.tolist()) for row in ids])
    assert torch.equal(module(ids), expected)


def test_sequences_shorter_than_an_n_gram_have_vectors() -> None:
    module = filled(longest=5)
    assert torch.equal(module(torch.tensor([[7]]))[0], reference(module, [7]))


def test_a_token_sees_as_many_before_it_as_the_longest_n_gram_has_and_none_after() -> None:
    module = filled()
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 4] = 99
    differs = (module(ids) != module(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6]


def test_the_beginning_is_no_token() -> None:
    module = filled()
    first, second = module(torch.tensor([[5]])), module(torch.tensor([[0, 5]]))
    assert not torch.equal(first[0, 0], second[0, 1])


def test_only_rows_that_were_looked_up_have_gradients() -> None:
    module = filled(rows=64)
    ids = torch.tensor([[3, 4, 3, 4]])
    module(ids).sum().backward()
    assert module.weight.grad is not None
    touched = module.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    rows = {
        number * 64 + place
        for number, places in enumerate(module.places(ids))
        for place in places.flatten().tolist()
    }
    assert set(touched) == rows
