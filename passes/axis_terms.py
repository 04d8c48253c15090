"""Terms for tensor dimensions, and their unification.

Every dimension of every tensor gets a term. An `Axis` is a variable with a size; it can be bound
to another term: a `Product` (a view split 32 into 4 heads of 8) or a `Sum` (96 is the query, key
and value parts, one after the other). Saying that two dimensions are the same one is `unify`,
which binds axes and refines them where the two sides are cut differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod


class Axis:
    """A dimension variable.

    Attributes:
        number: Its identity, in order of creation.
        size: How many units it has, at the example's sizes.
        dynamic: Whether the size differs between calls.
        bound: What it was found to be, None while it stands for itself.
    """

    __slots__ = ("bound", "dynamic", "number", "size")

    def __init__(self, number: int, size: int, dynamic: bool) -> None:
        """Create a free axis."""
        self.number = number
        self.size = size
        self.dynamic = dynamic
        self.bound: Term | None = None

    def __repr__(self) -> str:
        """Return the number and size of a free axis, or what it is bound to."""
        return f"a{self.number}:{self.size}" if self.bound is None else repr(normal(self))


@dataclass(frozen=True)
class Product:
    """A dimension that enumerates several axes, the first one slowest."""

    factors: tuple[Term, ...]

    def __repr__(self) -> str:
        """Return the factors."""
        return "(" + " x ".join(map(repr, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True)
class Sum:
    """A dimension that is several dimensions, one after the other."""

    parts: tuple[Term, ...]

    def __repr__(self) -> str:
        """Return the parts."""
        return "[" + " + ".join(map(repr, self.parts)) + "]"


Term = Axis | Product | Sum
ONE = Product(())


def normal(term: Term) -> Term:
    """Return a term over free axes only: nested products and sums flat, factors of size 1 gone."""
    if isinstance(term, Axis):
        if term.bound is None:
            return term
        term.bound = normal(term.bound)
        return term.bound
    if isinstance(term, Product):
        factors: list[Term] = []
        for item in map(normal, term.factors):
            factors.extend(item.factors if isinstance(item, Product) else (item,))
        return factors[0] if len(factors) == 1 else Product(tuple(factors))
    parts: list[Term] = []
    for item in map(normal, term.parts):
        parts.extend(item.parts if isinstance(item, Sum) else (item,))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def size_of(term: Term, sizes: Mapping[int, int] | None = None) -> int:
    """Return how many elements a dimension has.

    Args:
        term: Its term.
        sizes: Other sizes for some axes, by their number.
    """
    term = normal(term)
    if isinstance(term, Axis):
        return term.size if sizes is None else sizes.get(term.number, term.size)
    if isinstance(term, Product):
        return prod(size_of(factor, sizes) for factor in term.factors)
    return sum(size_of(part, sizes) for part in term.parts)


def atoms(term: Term) -> Iterator[Axis]:
    """Yield the free axes of a term from left to right, each as often as it occurs."""
    term = normal(term)
    if isinstance(term, Axis):
        yield term
    else:
        for item in term.factors if isinstance(term, Product) else term.parts:
            yield from atoms(item)


def owners(term: Term, axis: Axis) -> list[int]:
    """Return, for every index along a dimension, which unit of `axis` it belongs to, or -1."""
    term = normal(term)
    if isinstance(term, Axis):
        return list(range(term.size)) if term is axis else [-1] * term.size
    if isinstance(term, Sum):
        return [owner for part in term.parts for owner in owners(part, axis)]
    result = [-1]
    for factor in term.factors:
        inner = owners(factor, axis)
        result = [mine if mine >= 0 else outer for outer in result for mine in inner]
    return result


def repeats(term: Term, axis: Axis) -> bool:
    """Return whether an index along a dimension can belong to two units of `axis`."""
    term = normal(term)
    if isinstance(term, Product):
        return sum(axis in atoms(factor) for factor in term.factors) > 1
    return isinstance(term, Sum) and any(repeats(part, axis) for part in term.parts)


class Unifier:
    """Creates axes and makes them equal.

    Attributes:
        conflicts: Pairs of a term and a sentence, for dimensions cut in ways that do not fit
            together; both sides of such a pair stay apart.
    """

    def __init__(self) -> None:
        """Start without axes."""
        self.conflicts: list[tuple[Term, str]] = []
        self._count = 0

    def fresh(self, size: int, dynamic: bool = False) -> Term:
        """Return a new axis, or `ONE` for a dimension that always has size 1."""
        if size == 1 and not dynamic:
            return ONE
        self._count += 1
        return Axis(self._count, size, dynamic)

    def unify(self, left: Term, right: Term) -> None:
        """Make two dimensions the same one, refining both until their cuts agree."""
        left, right = normal(left), normal(right)
        if left == right:
            return
        if size_of(left) != size_of(right):
            self._conflict(left, right)
        elif isinstance(left, Axis):
            self._bind(left, right)
        elif isinstance(right, Axis):
            self._bind(right, left)
        elif isinstance(left, Product) and isinstance(right, Product):
            self._align(list(left.factors), list(right.factors), Product)
        elif isinstance(left, Sum) and isinstance(right, Sum):
            self._align(list(left.parts), list(right.parts), Sum)
        elif isinstance(left, Sum) and isinstance(right, Product):
            self._distribute(left, right)
        elif isinstance(left, Product) and isinstance(right, Sum):
            self._distribute(right, left)

    def _bind(self, axis: Axis, term: Term) -> None:
        if isinstance(term, Axis):
            term.dynamic = term.dynamic or axis.dynamic
        elif any(atom is axis for atom in atoms(term)):
            self._conflict(axis, term)
            return
        axis.bound = term

    def _align(self, left: list[Term], right: list[Term], kind: type[Product] | type[Sum]) -> None:
        """Walk both lists, cutting the larger head where the smaller one ends."""
        while left and right:
            a, b = left.pop(0), right.pop(0)
            larger, smaller = max(size_of(a), size_of(b)), min(size_of(a), size_of(b))
            if larger == smaller:
                self.unify(a, b)
                continue
            if kind is Product and larger % smaller:
                self._conflict(kind((a, *left)), kind((b, *right)))
                return
            rest = self.fresh(larger // smaller if kind is Product else larger - smaller)
            if size_of(a) > size_of(b):
                self.unify(a, kind((b, rest)))
                left.insert(0, rest)
            else:
                self.unify(b, kind((a, rest)))
                right.insert(0, rest)

    def _distribute(self, total: Sum, product: Product) -> None:
        """Make a sum equal to a product: cut the slowest factor where the parts end."""
        outer, inner = product.factors[0], Product(product.factors[1:])
        stride = size_of(inner)
        if any(size_of(part) % stride for part in total.parts):
            self._conflict(total, product)
            return
        counts = [self.fresh(size_of(part) // stride) for part in total.parts]
        for part, count in zip(total.parts, counts, strict=True):
            self.unify(part, Product((count, inner)))
        self.unify(outer, Sum(tuple(counts)))

    def _conflict(self, left: Term, right: Term) -> None:
        reason = f"is grouped in two ways, {_layout(left)} and {_layout(right)}"
        self.conflicts.extend([(left, reason), (right, reason)])


def product_of(terms: Sequence[Term]) -> Term:
    """Return the term of several dimensions merged into one."""
    return terms[0] if len(terms) == 1 else Product(tuple(terms))


def _layout(term: Term) -> str:
    term = normal(term)
    if isinstance(term, Axis):
        return str(term.size)
    if isinstance(term, Product):
        return "x".join(str(size_of(factor)) for factor in term.factors) or "1"
    return "+".join(str(size_of(part)) for part in term.parts)
