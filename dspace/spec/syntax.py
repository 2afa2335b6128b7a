"""The formula language: text -> syntax tree, with a place for every node and nothing ever evaluated.

Grammar (precedence as in mathematics; ``**`` binds tighter than unary minus and associates to the right):

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/") unary)*
    unary   = ("-" | "+") unary | power
    power   = atom ("**" unary)?
    atom    = NUMBER | NAME | NAME "(" sum ("," sum)* ")" | "(" sum ")"

The same parser reads the formulas of a spec and the recipes of its ``[layer]`` table; which names and
functions are known is decided by the caller. Sizes are bounded (:data:`MAX_LENGTH`, :data:`MAX_DEPTH`), so
that no formula can exhaust the stack of this parser or of a recursive walk over its tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

MAX_LENGTH = 4_000
"""Longest formula, in characters."""

MAX_DEPTH = 60
"""Deepest syntax tree; a chain of n sums has depth n."""


@dataclass(frozen=True)
class Number:
    """A numeral; ``column`` counts the formula's characters from 1, here and in all nodes."""

    value: int | float
    column: int


@dataclass(frozen=True)
class Name:
    id: str
    column: int


@dataclass(frozen=True)
class Unary:
    """``op`` is ``"-"`` (a unary plus leaves no node)."""

    op: str
    operand: Node
    column: int


@dataclass(frozen=True)
class Binary:
    """``op`` is one of ``+ - * / **``; ``column`` is the operator's."""

    op: str
    left: Node
    right: Node
    column: int


@dataclass(frozen=True)
class Call:
    func: str
    args: tuple[Node, ...]
    column: int


Node = Number | Name | Unary | Binary | Call


class FormulaError(Exception):
    """A formula that cannot be read; ``column`` counts its characters from 1."""

    def __init__(self, message: str, column: int, cure: str = "", suggestion: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.column = column
        self.cure = cure
        self.suggestion = suggestion


_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<op>\*\*|[-+*/(),])"
)

_CURES = {
    "^": "write ** for a power, as in k**2",
    "%": "there is no remainder in this language",
    ".": "nothing has attributes here: the language has numbers, names, + - * / ** and its functions only",
    "[": "axes are named in [inputs], never indexed",
    "{": "a formula has no braces; group with ( )",
    "=": "a formula is a value, without '='; name a subexpression in the table [define]",
    "<": "there are no comparisons; use minimum(a, b) or maximum(a, b)",
    ">": "there are no comparisons; use minimum(a, b) or maximum(a, b)",
    "!": "there are no comparisons; use minimum(a, b) or maximum(a, b)",
    "@": "contract explicitly: sum_k(a * b) or sum_v(a * b)",
    '"': "a formula has no strings: nothing here is evaluated as Python",
    "'": "a formula has no strings: nothing here is evaluated as Python",
    ":": "a formula has no slices and no lambdas: nothing here is evaluated as Python",
    "#": "put the comment after the closing quote",
}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        column = position + 1
        if match is None:
            char = text[position]
            if char.isalpha():
                raise FormulaError(
                    f"the letter {char!r} is not ASCII", column, cure="spell names with a-z, A-Z, 0-9 and _"
                )
            cure = _CURES.get(char, "the language has numbers, names, + - * / ** , ( ) and its functions only")
            raise FormulaError(f"unexpected character {char!r}", column, cure=cure)
        if match.lastgroup != "space":
            yield _Token(str(match.lastgroup), match.group(), column)
        position = match.end()
    yield _Token("end", "", len(text) + 1)


def _number(token: _Token) -> Number:
    value = float(token.text)
    if value > 1e30 or (value and value < 1e-30) or len(token.text) > 40:
        raise FormulaError(
            f"the number {token.text[:24]} is out of range", token.column, cure="use numbers between 1e-30 and 1e30"
        )
    if value == 0 and token.text.strip("0.eE+-"):
        digits = re.split("[eE]", token.text)[0]
        if digits.strip("0."):
            raise FormulaError(
                f"the number {token.text[:24]} is out of range", token.column, cure="use numbers between 1e-30 and 1e30"
            )
    whole = value.is_integer() and value < 2**53
    return Number(int(value) if whole else value, token.column)


class _Parser:
    """Recursive descent; every node carries its depth on the way up, so that chains are bounded too."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        self.index = 0
        self.nesting = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def next(self) -> _Token:
        token = self.token
        self.index += 1
        return token

    def descend(self, column: int) -> None:
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            raise too_deep(column)

    def parse(self) -> Node:
        node, _ = self.sum()
        token = self.token
        if token.kind == "end":
            return node
        if token.text == ")":
            raise FormulaError("')' without its '('", token.column, cure="remove it, or open it before")
        if token.text == ",":
            raise FormulaError("a comma outside of a function's arguments", token.column, cure="remove it")
        raise FormulaError(
            f"an operator is missing before {token.text!r}", token.column, cure=f"write * {token.text} for a product"
        )

    def sum(self) -> tuple[Node, int]:
        return self.chain(("+", "-"), self.product)

    def product(self) -> tuple[Node, int]:
        return self.chain(("*", "/"), self.unary)

    def chain(self, ops: tuple[str, ...], operand) -> tuple[Node, int]:
        left, depth = operand()
        while self.token.text in ops:
            op = self.next()
            right, right_depth = operand()
            depth = checked_depth(max(depth, right_depth) + 1, op.column)
            left = Binary(op.text, left, right, op.column)
        return left, depth

    def unary(self) -> tuple[Node, int]:
        if self.token.text not in ("-", "+"):
            return self.power()
        op = self.next()
        self.descend(op.column)
        operand, depth = self.unary()
        self.nesting -= 1
        if op.text == "+":
            return operand, depth
        return Unary("-", operand, op.column), checked_depth(depth + 1, op.column)

    def power(self) -> tuple[Node, int]:
        base, depth = self.atom()
        if self.token.text != "**":
            return base, depth
        op = self.next()
        self.descend(op.column)
        exponent, exponent_depth = self.unary()
        self.nesting -= 1
        return Binary("**", base, exponent, op.column), checked_depth(max(depth, exponent_depth) + 1, op.column)

    def atom(self) -> tuple[Node, int]:
        token = self.next()
        if token.kind == "number":
            return _number(token), 1
        if token.kind == "name":
            if self.token.text == "(":
                return self.call(token)
            return Name(token.text, token.column), 1
        if token.text == "(":
            self.descend(token.column)
            inner = self.sum()
            self.close(token)
            return inner
        if token.kind == "end":
            raise FormulaError(
                "the formula ends where a value should stand", token.column, cure="complete it, or write 0"
            )
        raise FormulaError(
            f"a value is missing before {token.text!r}", token.column, cure="write a number, a name or ( ... )"
        )

    def call(self, name: _Token) -> tuple[Node, int]:
        opening = self.next()
        self.descend(name.column)
        args, depth = [], 1
        if self.token.text != ")":
            while True:
                arg, arg_depth = self.sum()
                args.append(arg)
                depth = max(depth, arg_depth + 1)
                if self.token.text != ",":
                    break
                self.next()
        self.close(opening)
        return Call(name.text, tuple(args), name.column), checked_depth(depth, name.column)

    def close(self, opening: _Token) -> None:
        token = self.token
        self.nesting -= 1
        if token.text == ")":
            self.next()
            return
        if token.kind == "end":
            raise FormulaError("'(' is never closed", opening.column, cure="add the ')'")
        raise FormulaError(
            f"an operator is missing before {token.text!r}", token.column, cure=f"write * {token.text} for a product"
        )


def too_deep(column: int) -> FormulaError:
    return FormulaError(
        f"the formula is nested more than {MAX_DEPTH} deep", column, cure="name parts of it in the table [define]"
    )


def checked_depth(depth: int, column: int) -> int:
    if depth > MAX_DEPTH:
        raise too_deep(column)
    return depth


def parse(text: str) -> Node:
    """Read one formula. Raises :class:`FormulaError` with the column of the offending character."""
    if len(text) > MAX_LENGTH:
        nesting = max(accumulate(("(" == c) - (")" == c) for c in text))
        if nesting > MAX_DEPTH:
            raise too_deep(1)
        raise FormulaError(
            f"the formula has {len(text)} characters, at most {MAX_LENGTH} are read",
            1,
            cure="name parts of it in the table [define]",
        )
    if not text.strip():
        raise FormulaError("the formula is empty", 1, cure="write 0 for nothing")
    return _Parser(text).parse()


def walk(node: Node) -> Iterator[Node]:
    """All nodes, the root first."""
    yield node
    for child in children(node):
        yield from walk(child)


def children(node: Node) -> tuple[Node, ...]:
    match node:
        case Unary():
            return (node.operand,)
        case Binary():
            return (node.left, node.right)
        case Call():
            return node.args
    return ()


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "**": 4}


def unparse(node: Node) -> str:
    """Canonical text: one spacing, one spelling of numerals, no needless parentheses."""
    return _unparse(node)[0]


def _unparse(node: Node) -> tuple[str, int]:
    match node:
        case Number(value):
            return (repr(value) if isinstance(value, int) else f"{value!r}"), 5
        case Name(id):
            return id, 5
        case Call(func, args):
            return f"{func}({', '.join(unparse(a) for a in args)})", 5
        case Unary(_, operand):
            text, level = _unparse(operand)
            return f"-{text if level >= 3 else f'({text})'}", 3
        case Binary(op, left, right):
            level = _PRECEDENCE[op]
            left_text, left_level = _unparse(left)
            right_text, right_level = _unparse(right)
            left_ok = left_level > level if op == "**" else left_level >= level
            right_ok = right_level >= 3 if op == "**" else right_level > level
            left_text = left_text if left_ok else f"({left_text})"
            right_text = right_text if right_ok else f"({right_text})"
            return (f"{left_text}**{right_text}" if op == "**" else f"{left_text} {op} {right_text}"), level
    raise TypeError(f"not a syntax node: {node!r}")
