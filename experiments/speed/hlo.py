"""A program that XLA compiled for a TPU, read from its text: what it computes, copies, moves and exchanges."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.speed.described import computations

Shape = tuple[int, ...]


class Array(NamedTuple):
    """An array of a compiled program, with its layout."""

    dtype: str
    shape: Shape
    order: Shape
    """axes from the fastest"""
    tile: Shape
    """of the fastest axes, the fastest last"""
    on_chip: bool
    """in vector memory rather than in the chip's main memory"""

    @property
    def elements(self) -> int:
        """As the program sees them."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return max(1, int(re.search(r"\d+$", self.dtype)[0]) // 8) if self.dtype[-1].isdigit() else 1

    @property
    def padded_bytes(self) -> int:
        """What it takes with its tiles filled up."""
        sizes = [self.shape[axis] for axis in self.order]
        for place, side in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ())):
            sizes[place] = -(-sizes[place] // side) * side
        return self.width * math.prod(sizes)


class Op(NamedTuple):
    """An instruction."""

    name: str
    result: tuple[Array, ...]
    kind: str
    operands: list[str]
    text: str


_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?[\]})]) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "copy-done", "iota"}


def _numbers(text: str | None) -> Shape:
    return tuple(int(number) for number in (text or "").split(",") if number)


def arrays(text: str) -> tuple[Array, ...]:
    """Those that a type names."""
    found = []
    for dtype, shape, order, place in _ARRAY.findall(text):
        tile = re.match(r"T\(([\d,]+)\)", place)
        found.append(Array(dtype, _numbers(shape), _numbers(order), _numbers(tile and tile[1]), "S(1)" in place))
    return tuple(found)


class Hlo:
    """A compiled program, read from its text; its chain's loop takes so many turns."""

    def __init__(self, text: str, turns: int) -> None:
        self.operations = {name: list(_operations(body)) for name, body in computations(text).items()}
        loops = [op for ops in self.operations.values() for op in ops if op.kind == "while"]
        chain = max(loops, key=lambda op: self.count(_named(op, "body")[0], "convolution"))
        [self.loop] = _named(chain, "body")
        self.turns = turns

    def within(self, name: str, *how: str) -> Iterator[Op]:
        """All operations of a computation and of those that it calls in these ways, once for each call."""
        for op in self.operations[name]:
            yield op
            for other in _named(op, *how):
                yield from self.within(other, *how)

    def all(self, name: str) -> Iterator[Op]:
        """Those of fusions too."""
        return self.within(name, "calls", "body", "condition", "branch_computations")

    def outer(self, name: str) -> Iterator[Op]:
        """Those that read and write memory: a fusion is one. The chain's loop is left out of what holds it."""
        for op in self.operations[name]:
            yield op
            for other in _named(op, "body", "branch_computations"):
                if other != self.loop:
                    yield from self.outer(other)

    def count(self, name: str, kind: str) -> int:
        """How many operations of a kind a computation has."""
        return sum(op.kind == kind for op in self.all(name))

    def collectives(self) -> list[dict[str, Any]]:
        """Each with its bytes and place."""
        in_chain = {op.name for op in self.all(self.loop)}
        kinds = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?$")
        return [
            {
                "kind": match[1],
                "bytes": sum(array.width * array.elements for array in op.result),
                "arrays": len(op.result),
                "place": "chain" if op.name in in_chain else "outside",
            }
            for op in self.all("ENTRY")
            if (match := kinds.match(op.kind))
        ]

    def copies(self, name: str, least: int) -> list[str]:
        """Copies of at least so many bytes, in words, and whether they stay in the chip's vector memory."""
        return [
            f"{op.kind} {array.dtype}{list(array.shape)} in {'vector' if array.on_chip else 'main'} memory"
            for op in self.outer(name)
            if op.kind in ("copy", "copy-start") and (array := op.result[0]).padded_bytes >= least
        ]

    def transposes(self, name: str) -> int:
        """Operations that do nothing but change an array's layout."""
        before = {op.name: op.result for op in self.outer(name)}
        moved = lambda op: before.get(op.operands[0], op.result)[0].order != op.result[0].order  # noqa: E731
        return sum(op.kind == "transpose" or (op.kind == "copy" and moved(op)) for op in self.outer(name))

    def rewrites(self, dtype: str, elements: int) -> int:
        """Operations that write an array of so many elements, which none but its update should."""
        return sum(
            op.kind not in _FREE and any(array.dtype == dtype and array.elements == elements for array in op.result)
            for op in self.outer("ENTRY")
        )

    def host_transfers(self) -> int:
        """Operations that speak with the host, and arrays in its memory."""
        kinds = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
        words = re.compile(r"S\(5\)|custom_call_target=\"[^\"]*(?:[Hh]ost|callback)")
        return sum(op.kind in kinds or bool(words.search(op.text)) for op in self.all("ENTRY"))

    def products(self) -> Iterator[tuple[float, str]]:
        """Every convolution and matrix product: its arithmetic and its operands' types."""
        for name, turns in (("ENTRY", 1), (self.loop, self.turns - 1)):
            for body in self.all_names(name):
                known = {op.name: op.result[0] for op in self.operations[body] if op.result}
                for op in self.operations[body]:
                    if op.kind == "convolution":
                        left, right = (known[operand] for operand in op.operands[:2])
                        each = math.prod(right.shape) // right.shape[re.search(r"_(\w+)->", op.text)[1].index("o")]
                        types = "×".join(sorted({left.dtype, right.dtype}))
                        yield 2.0 * turns * each * op.result[0].elements, types

    def all_names(self, name: str) -> Iterator[str]:
        """A computation and those that it calls, once for each call."""
        yield name
        for op in self.operations[name]:
            for other in _named(op, "calls", "body", "condition", "branch_computations"):
                yield from self.all_names(other)

    def convolution_types(self) -> dict[str, float]:
        """The share of arithmetic by the types of a convolution's operands."""
        shares: dict[str, float] = {}
        for flops, types in self.products():
            shares[types] = shares.get(types, 0) + flops
        return {types: round(flops / sum(shares.values()), 4) for types, flops in shares.items()}

    def padding(self, name: str) -> float:
        """The share of what a computation writes that is padding of tiles."""
        written = [array for op in self.outer(name) if op.kind not in _FREE for array in op.result]
        useful = sum(array.width * array.elements for array in written)
        return round(1 - useful / sum(array.padded_bytes for array in written), 3)

    def traffic(self, name: str) -> int:
        """Bytes that a computation's operations read from and write to the chip's main memory."""
        results = {op.name: op.result for op in self.outer(name)}
        total = 0
        for op in self.outer(name):
            if op.kind not in _FREE:
                read = [array for operand in op.operands for array in results.get(operand, ())]
                total += sum(array.padded_bytes for array in (*read, *op.result) if not array.on_chip)
        return total


def _operations(body: str) -> Iterator[Op]:
    for name, kind, opcode, rest in _OPERATION.findall(body):
        operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
        yield Op(name, arrays(kind), opcode, operands, rest)


def _named(op: Op, *how: str) -> list[str]:
    """The computations that an operation calls in these ways."""
    found = []
    for way in how:
        for names in re.findall(rf"\b{way}=(\{{[^}}]*\}}|%[\w.-]+)", op.text):
            found += re.findall(r"%([\w.-]+)", names)
    return found
