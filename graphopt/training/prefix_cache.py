"""The frozen part of a model, computed once for every sample and read back in every later epoch.

```python
model = graphopt.optimize(model, batch, recipe=["hoist-frozen-prefix"])
with PrefixCache(model, "cache/") as cache:
    for batch in loader:
        with cache.samples(batch.pop("sample_ids")):
            loss = model(**batch).loss
        loss.backward()
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, fx, nn

from graphopt.errors import TrainingError
from graphopt.passes.calls import canonical_arguments
from graphopt.passes.exact.hoist_frozen_prefix import HoistFrozenPrefix, frozen_names
from graphopt.passes.facts import attribute_of
from graphopt.passes.frozen_prefix import (
    FrozenPrefix,
    frozen_prefix,
    has_rows,
    prefix_graph,
    remaining_graph,
    token_dim,
)
from graphopt.passes.padding import padding_input, real_tokens
from graphopt.passes.program import Program
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import preserved, relative_error, rounding_bound
from graphopt.runtime import install_beside, installation_of

from .ranks import whole
from .sample_rows import batch_of, bytes_of, real_part, without_padding
from .sample_store import SampleStore

_STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class _Opened(NamedTuple):
    """A store and the types of the values before they are stored."""

    store: SampleStore
    types: list[torch.dtype]


class PrefixCache:
    """Runs an optimized model without its frozen prefix wherever the result is known.

    What is stored follows from the sample's id and content, the frozen weights, the prefix's graph
    and the arithmetic (autocast); if any of these changes, the sample is computed again. Values are
    always those that were stored, also when they have just been computed, so a run gives the same
    losses with an empty, a partly filled and a full cache.

    Where an input marks padding and the model is found to depend on real tokens only, just those
    are stored, and a sample may come back padded to another length; padded positions of the values
    are then 0. Otherwise whole rows are stored, and a row padded to another length is another one.

    Several ranks may share a directory: each writes to a folder of its own and reads all of them.

    Attributes:
        hits: Samples that were read.
        misses: Samples that were computed.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        largest_bytes: int | None = None,
    ) -> None:
        """Open or make a cache.

        Args:
            model: A model optimized with `hoist-frozen-prefix`; inside of
                DistributedDataParallel, the module inside.
            directory: Where the files lie; caches of several models may share it.
            dtype: How float values are stored; wider ones are rounded to it.
            largest_bytes: Bytes that this rank may write in all; None: what the disk has.

        Raises:
            TrainingError: if the model has no hoisted prefix, or the type is none to store.
        """
        if dtype not in _STORED:
            raise TrainingError(
                f"expected one of {[str(d) for d in _STORED]} to store, got {dtype}"
            )
        self._model = model
        self._program, self._prefix = _hoisted(model)
        self._signature = self._program.signature
        self._directory = Path(directory)
        self._dtype = dtype
        self._largest_bytes = largest_bytes
        self._head = _beside(self._program, prefix_graph(self._program, self._prefix))
        self._rest = _beside(self._program, remaining_graph(self._program, self._prefix))
        self._tensors = _read_tensors(self._program, self._prefix)
        self._versions: tuple[tuple[int, int, bool], ...] = ()
        self._stores: dict[str, _Opened] = {}
        self._identity = ""
        self._only_real: bool | None = None if padding_input(self._program) else False
        self.hits = 0
        self.misses = 0

    @contextmanager
    def samples(self, ids: Iterable[Any]) -> Iterator[None]:
        """Say which samples the model is called with: one id per row, a number or a text.

        Within the context every call of the model is of these samples, and must be the captured
        one.

        Raises:
            TrainingError: in the call, if it does not fit the ids or the captured call, or if the
                frozen part was trained.
        """
        names = [str(item.item() if isinstance(item, Tensor) else item) for item in ids]
        table = vars(self._model)
        before = table.get("forward")

        @wraps(type(self._model).forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(names, args, kwargs)

        table["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                del table["forward"]
            else:
                table["forward"] = before

    @property
    def size_bytes(self) -> int:
        """Bytes that this rank has stored."""
        return sum(opened.store.size_bytes for opened in self._stores.values())

    def close(self) -> None:
        """Write down what was stored; the cache can be used again."""
        for opened in self._stores.values():
            opened.store.close()
        self._stores.clear()

    def __enter__(self) -> PrefixCache:
        """Return the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write down what was stored, also after Ctrl-C."""
        self.close()

    def _forward(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = canonical_arguments(self._signature, args, kwargs)
        tensors, structure = flatten(arguments)
        if structure != self._program.inputs or not self._program.accepts(tensors, self._model):
            raise TrainingError(
                "expected the call that the model was captured with, got one with other arguments, "
                "sizes, types or in another mode; optimize with this call as the example, or make "
                "it outside of cache.samples(...)"
            )
        rows = self._rows(tensors)
        if rows != len(names):
            raise TrainingError(f"expected one id for each of {rows} samples, got {len(names)}")
        real = real_tokens(self._program, arguments)
        values = self._values(names, tensors, real)
        return self._program.outputs.rebuild(self._rest(self._model, *tensors, *values))

    def _rows(self, tensors: Sequence[Tensor]) -> int:
        index = next(
            i
            for i, node in enumerate(self._program.placeholders)
            if has_rows(node) and node.name in self._prefix.inputs
        )
        return tensors[index].shape[0]

    def _values(self, names: list[str], tensors: list[Tensor], real: Tensor | None) -> list[Tensor]:
        """Return the prefix's values for a batch, computing those that are not stored."""
        self._refuse_trained()
        if self._only_real is None and real is not None and not bool(real.all()):
            self._only_real = self._ignores_padding(tensors, real)
            self._versions = self._present_versions()  # looking wrote the buffers' own values back
        # Before the first padding whole rows and real tokens are the same.
        kept = real if self._only_real is not False else None
        keys = self._keys(names, tensors, kept)
        store, types = self._opened(tensors)
        found = [store.get(key) for key in keys]
        if None in found:
            store.refresh()
            found = [store.get(key) for key in keys]
        missing = [row for row, entry in enumerate(found) if entry is None]
        if missing:
            computed = self._entries(tensors, missing, kept, real)
            for row, entry in zip(missing, computed, strict=True):
                store.put(keys[row], entry)
                found[row] = store.get(keys[row])
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        entries = [entry for entry in found if entry is not None]
        return [
            batch_of(
                [entry[i] for entry in entries], dtype, dim, None if packed else kept, packed
            ).to(tensors[0].device)
            for i, (dtype, dim, packed) in enumerate(
                zip(types, self._prefix.token_dims, self._prefix.packed, strict=True)
            )
        ]

    def _entries(
        self, tensors: Sequence[Tensor], rows: list[int], kept: Tensor | None, real: Tensor | None
    ) -> list[list[Tensor]]:
        """Compute what is stored of some rows of a batch."""
        parts: list[Sequence[Tensor]] = []
        values = self._compute(tensors, rows)
        for value, dim, packed in zip(
            values, self._prefix.token_dims, self._prefix.packed, strict=True
        ):
            if packed:
                assert real is not None
                assert dim is not None
                parts.append(value.split(real[rows].sum(1).tolist(), dim))
            else:
                cut = [None if kept is None else kept[row] for row in rows]
                parts.append([real_part(v, dim, c) for v, c in zip(value, cut, strict=True)])
        return [list(entry) for entry in zip(*parts, strict=True)]

    def _compute(self, tensors: Sequence[Tensor], rows: list[int]) -> list[Tensor]:
        """Run the prefix on some rows of a batch."""
        count = self._rows(tensors)
        chosen = list(tensors)
        if len(rows) < count:
            index = torch.tensor(rows, device=tensors[0].device)
            chosen = [
                tensor.index_select(0, index) if has_rows(node) and len(tensor) == count else tensor
                for tensor, node in zip(tensors, self._program.placeholders, strict=True)
            ]
        with torch.no_grad():
            return list(self._head(self._model, *chosen))

    def _opened(self, tensors: Sequence[Tensor]) -> _Opened:
        """Return the store for the present weights and arithmetic."""
        arithmetic = _arithmetic(tensors[0].device)
        if arithmetic not in self._stores:
            types = [value.dtype for value in self._compute(tensors, [0])]
            stored = [
                self._dtype if t.is_floating_point and t.itemsize > self._dtype.itemsize else t
                for t in types
            ]
            name = _digest(self._identity, arithmetic, *map(str, stored))
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            store = SampleStore(
                self._directory / name, stored, rank=rank, largest_bytes=self._largest_bytes
            )
            store.refresh()
            self._stores[arithmetic] = _Opened(store, types)
        return self._stores[arithmetic]

    def _keys(self, names: list[str], tensors: Sequence[Tensor], kept: Tensor | None) -> list[str]:
        """Return the id of each sample with the hash of what the prefix reads of it."""
        count = self._rows(tensors)
        inputs = [
            (node, tensor.cpu())
            for node, tensor in zip(self._program.placeholders, tensors, strict=True)
            if node.name in self._prefix.inputs
        ]
        places = None if kept is None else kept.cpu()
        keys: list[str] = []
        for row, name in enumerate(names):
            content = blake2b(digest_size=16)
            for node, tensor in inputs:
                part = tensor[row] if has_rows(node) and len(tensor) == count else tensor
                if places is not None:
                    part = real_part(part, token_dim(self._program, node), places[row])
                content.update(f"{node.name} {list(part.shape)} {part.dtype} ".encode())
                content.update(bytes_of(part))
            if places is not None:
                content.update(bytes_of(places[row].nonzero()))
            keys.append(f"{name} {content.hexdigest()}")
        return keys

    def _ignores_padding(self, tensors: Sequence[Tensor], real: Tensor) -> bool:
        """Say whether padding changes neither values at real tokens nor what is read of a result.

        The values are compared with those of the batch with one more padded token, the results
        with those of values that are 0 at padded tokens.
        """
        longer = self._with_one_more(tensors, real)
        if longer is None:
            return False
        bound = rounding_bound(self._program)
        with preserved(self._model), torch.no_grad():
            self._model.eval()
            rows = list(range(len(real)))
            whole_values = self._compute(tensors, rows)
            pairs = zip(whole_values, self._compute(longer, rows), strict=True)
            cut: list[Tensor] = []
            dims = zip(self._prefix.token_dims, self._prefix.packed, strict=True)
            for (value, other), (dim, packed) in zip(pairs, dims, strict=True):
                first, second = value, other
                if dim is not None and not packed:
                    second = other.narrow(dim, 0, value.shape[dim])
                    first, second = (without_padding(item, dim, real) for item in (value, second))
                if relative_error(second, first) > bound:
                    return False
                cut.append(first)
            results = self._rest(self._model, *tensors, *whole_values)
            others = self._rest(self._model, *tensors, *cut)
            for node, result, other in zip(self._results(), results, others, strict=True):
                if not isinstance(result, Tensor):
                    continue
                dim = token_dim(self._program, node)
                if dim is not None:
                    result, other = (without_padding(item, dim, real) for item in (result, other))
                if relative_error(other, result) > bound:
                    return False
        return True

    def _results(self) -> list[fx.Node]:
        (nodes,) = self._program.result.args
        assert isinstance(nodes, (tuple, list))
        return [node for node in nodes if isinstance(node, fx.Node)]

    def _with_one_more(self, tensors: Sequence[Tensor], real: Tensor) -> list[Tensor] | None:
        """Return a batch with one more padded token at the end, None if it would be too long."""
        padding = padding_input(self._program)
        longer: list[Tensor] = []
        for node, tensor in zip(self._program.placeholders, tensors, strict=True):
            dim = token_dim(self._program, node)
            if dim is None:
                longer.append(tensor)
                continue
            more = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
            if node.name == padding:
                more = tensor[~real][:1].expand_as(more)
            longer.append(torch.cat([tensor, more], dim))
        return longer if self._program.fits(longer, self._model) else None

    def _refuse_trained(self) -> None:
        """Refuse a prefix that is trained; take note of one that has other weights now."""
        versions = self._present_versions()
        if versions == self._versions:
            return
        trained = [name for name, tensor in self._tensors.items() if tensor.requires_grad]
        if trained:
            raise TrainingError(
                f"expected the parameters of the frozen prefix to stay frozen, got {trained[0]!r} "
                "with requires_grad=True; freeze it again, or optimize the model anew"
            )
        self.close()
        self._identity = _digest(
            self._program.model.__class__.__name__,
            str(prefix_graph(self._program, self._prefix)),
            *(part for item in self._tensors.items() for part in _described(*item)),
        )
        self._versions = versions

    def _present_versions(self) -> tuple[tuple[int, int, bool], ...]:
        """Return what changes whenever a tensor of the prefix is written to."""
        return tuple((id(t), t._version, t.requires_grad) for t in self._tensors.values())


def _hoisted(model: nn.Module) -> tuple[Program, FrozenPrefix]:
    """Return the program of a model and its hoisted prefix."""
    installation = installation_of(model)
    if installation is not None and installation.program is not None:
        program = installation.program
        for record in installation.plan.changes:
            if record.pass_name == HoistFrozenPrefix.name:
                prefix = frozen_prefix(program, frozen_names(program, record.change))
                if prefix.values:
                    return program, prefix
    raise TrainingError(
        f"expected a model optimized with {HoistFrozenPrefix.name}, got {type(model).__name__}; "
        f'pass graphopt.optimize(model, batch, recipe=["{HoistFrozenPrefix.name}"]) of a model '
        "whose first layers are frozen, and see its misses if it refuses"
    )


def _beside(program: Program, graph: fx.Graph) -> Callable[..., Any]:
    part = program.of_copy(program.model)
    part.graph = graph
    return install_beside(part)


def _read_tensors(program: Program, prefix: FrozenPrefix) -> dict[str, Tensor]:
    """Return the parameters and buffers that the prefix reads, by name."""
    found: dict[str, Tensor] = {}
    for node in prefix_graph(program, prefix).nodes:
        name = str(node.target)
        if node.op == "call_module":
            module = program.module(name)
            for key, value in [*module.named_parameters(), *module.named_buffers()]:
                found[f"{name}.{key}"] = value
        elif node.op == "get_attr":
            value = attribute_of(program, name)
            if isinstance(value, Tensor):
                found[name] = value
    return found


def _arithmetic(device: torch.device) -> str:
    """Return what decides how the same operations are rounded."""
    if not torch.is_autocast_enabled(device.type):
        return device.type
    return f"{device.type} autocast {torch.get_autocast_dtype(device.type)}"


def _described(name: str, tensor: Tensor) -> tuple[str, str]:
    value = whole(tensor.detach()).cpu()
    return f"{name} {list(value.shape)} {value.dtype}", blake2b(bytes_of(value)).hexdigest()


def _digest(*parts: str) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()
