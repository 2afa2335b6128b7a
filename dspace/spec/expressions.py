"""Syntax tree -> SymPy expression with its axes, reporting everything wrong with it on the way."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from fractions import Fraction

import sympy

from dspace.math.functions import FUNCTIONS
from dspace.math.ir import CONTRACTIONS, Axes, drop_axis, join_axes
from dspace.spec.syntax import MAX_DEPTH, Binary, Call, Name, Node, Number, Unary, children

ARITY = {name: 1 for name in FUNCTIONS} | {"minimum": 2, "maximum": 2, "sum_k": 1, "sum_v": 1}
"""Every function of the formula language with its number of arguments."""

MAX_EXPONENT = 64
MAX_NODES = 5_000
"""Largest formula after its defined names are replaced by what they stand for."""
MAX_PRODUCT = 2_000
"""Most terms of a formula once it is multiplied out over one denominator: what algebra with it may cost."""

_HABITS = {
    "sum": "sum_k or sum_v",
    "dot": "sum_k",
    "einsum": "sum_k",
    "min": "minimum",
    "max": "maximum",
    "clip": "minimum",
    "clamp": "minimum",
    "relu": "maximum",
    "logistic": "sigmoid",
    "ln": "log",
    "expit": "sigmoid",
    "fabs": "abs",
    "pow": "**",
    "square": "**",
    "lambda": "",
}


@dataclass(frozen=True)
class Meaning:
    """What a formula means: its expression (defined names replaced) and the axes it lives on."""

    expr: sympy.Expr
    axes: Axes


Reporter = Callable[..., None]
"""``report(message, column, cure="", suggestion="")``"""


@dataclass
class Scope:
    """The names that a formula may use."""

    symbols: Mapping[str, tuple[sympy.Symbol, Axes]]
    defines: Mapping[str, Node] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)
    """Names that exist but not here, with the reason and cure."""
    broken: Set[str] = frozenset()
    """Defined names whose own mistakes are reported already: a formula that uses one has no meaning."""
    extents: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.symbols, *self.defines]


def nearest(word: str, known: Iterable[str]) -> str:
    """The known spelling closest to ``word``, or empty."""
    known = list(known)
    found = difflib.get_close_matches(word[:64], known, n=1, cutoff=0.55)
    if found:
        return found[0]
    folded = {k.lower(): k for k in known}
    return folded.get(word.lower(), "")


def listed(names: Iterable[str], limit: int = 14) -> str:
    names = list(names)
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def interpret(node: Node, scope: Scope, report: Reporter) -> Meaning | None:
    """Meaning of ``node`` in ``scope``, or None when something was reported."""
    size, depth = extent(node, scope)
    if size > MAX_NODES or depth > MAX_DEPTH:
        report(
            f"the formula has more than {MAX_NODES} terms, or {MAX_DEPTH} levels, once its defined names are replaced",
            node.column,
            cure="shorten the chain of [define] entries",
        )
        return None
    meaning = _Interpreter(scope, report).visit(node)
    if meaning is not None and multiplied_out(meaning.expr) > MAX_PRODUCT:
        report(
            f"multiplied out, the formula has more than {MAX_PRODUCT} terms",
            node.column,
            cure="lower the powers of sums, or write a power x**n of a positive sum as exp(n * log(x))",
        )
        return None
    return meaning


def multiplied_out(expr: sympy.Expr) -> int:
    """Terms of numerator and denominator once ``expr`` stands over one denominator, multiplied out: an upper bound.

    What is inside of a function counts on its own; the largest count is returned.
    """
    largest = 1
    memory: dict[sympy.Expr, tuple[int, int]] = {}

    def count(e: sympy.Expr) -> tuple[int, int]:
        if e not in memory:
            memory[e] = visit(e)
        return memory[e]

    def visit(e: sympy.Expr) -> tuple[int, int]:
        nonlocal largest
        if not e.args:
            return 1, 1
        if e.is_Mul:
            parts = [count(a) for a in e.args]
            found = math.prod(n for n, _ in parts), math.prod(d for _, d in parts)
        elif e.is_Add:
            parts = [count(a) for a in e.args]
            denominators = {sympy.fraction(a)[1]: d for a, (_, d) in zip(e.args, parts, strict=True)}
            common = math.prod(denominators.values())
            found = sum(n * (common // d) for n, d in parts), common
        elif e.is_Pow and e.exp.is_Integer:
            times = abs(int(e.exp))
            top, bottom = (math.comb(times + terms - 1, times) for terms in count(e.base))
            found = (top, bottom) if e.exp > 0 else (bottom, top)
        else:
            for a in e.args:
                count(a)
            return 1, 1
        largest = max(largest, *found)
        return found

    count(expr)
    return largest


def extent(node: Node, scope: Scope) -> tuple[int, int]:
    """Nodes and depth once defined names are replaced (each definition is measured once)."""
    if isinstance(node, Name) and node.id in scope.defines and node.id not in scope.broken:
        if node.id not in scope.extents:
            scope.extents[node.id] = extent(scope.defines[node.id], scope)
        return scope.extents[node.id]
    below = [extent(child, scope) for child in children(node)]
    return 1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0)


class _Interpreter:
    def __init__(self, scope: Scope, report: Reporter) -> None:
        self.scope = scope
        self.report = report
        self.defined: dict[str, Meaning | None] = {}

    def visit(self, node: Node) -> Meaning | None:
        match node:
            case Number(value):
                return Meaning(sympy.Integer(value) if isinstance(value, int) else rational(value), "")
            case Name():
                return self.name(node)
            case Unary(_, operand):
                inner = self.visit(operand)
                return inner and Meaning(-inner.expr, inner.axes)
            case Binary():
                return self.binary(node)
            case Call():
                return self.call(node)
        raise TypeError(f"not a syntax node: {node!r}")

    def name(self, node: Name) -> Meaning | None:
        name = node.id
        if name in self.scope.broken:
            return None
        if name in self.scope.symbols:
            return Meaning(*self.scope.symbols[name])
        if name in self.scope.hidden:
            self.report(f"{name!r} cannot be used here", node.column, cure=self.scope.hidden[name])
            return None
        if name in self.scope.defines:
            if name not in self.defined:
                # A defined name stands for its text: mistakes inside are reported where it is used.
                def inside(message: str, column: int, cure: str = "", suggestion: str = "") -> None:
                    self.report(f"in the definition of {name!r}: {message}", node.column, cure, suggestion)

                inner = _Interpreter(self.scope, inside)
                inner.defined = self.defined
                self.defined[name] = inner.visit(self.scope.defines[name])
            return self.defined[name]
        if name in ARITY:
            self.report(f"{name!r} is a function", node.column, cure=f"call it: {name}(...)")
            return None
        cure = f"the names usable here are {listed(self.scope.names)}; declare others in [inputs] or [parameters]"
        self.report(f"unknown name {name!r}", node.column, cure=cure, suggestion=nearest(name, self.scope.names))
        return None

    def binary(self, node: Binary) -> Meaning | None:
        left, right = self.visit(node.left), self.visit(node.right)
        if left is None or right is None:
            return None
        a, b, axes = left.expr, right.expr, join_axes(left.axes, right.axes)
        if node.op == "**":
            return self.power(node, a, b, axes)
        if node.op == "/" and b.is_zero:
            self.report("division by zero", node.column, cure="the denominator is always 0: change it")
            return None
        results = {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}
        return self.checked(results[node.op](b), axes, node)

    def power(self, node: Binary, base: sympy.Expr, exponent: sympy.Expr, axes: Axes) -> Meaning | None:
        if exponent.is_Rational:
            if abs(exponent) > MAX_EXPONENT:
                self.report(
                    f"the exponent is larger than {MAX_EXPONENT}", node.right.column, cure="use exp(n * log(x))"
                )
                return None
            if base.is_zero and exponent < 0:
                self.report("division by zero", node.column, cure="0 has no negative powers")
                return None
        if exponent.is_integer and exponent.is_Rational:
            return self.checked(base**exponent, axes, node)
        if not base.is_nonnegative or (not exponent.is_Rational and not base.is_positive):
            self.report(
                "a power with this exponent needs a positive base",
                node.column,
                cure="declare the base's domain as positive, or use a whole exponent",
            )
            return None
        return self.checked(base**exponent, axes, node)

    def call(self, node: Call) -> Meaning | None:
        if node.func not in ARITY:
            known = [*ARITY]
            habit = _HABITS.get(node.func, "")
            self.report(
                f"unknown function {node.func!r}",
                node.column,
                cure=f"the functions are {', '.join(known)}"
                + ("; products need an operator: write name * (...)" if node.func in self.scope.names else ""),
                suggestion=habit or nearest(node.func, known),
            )
            return None
        args = [self.visit(arg) for arg in node.args]
        if len(args) != ARITY[node.func]:
            wanted = "1 argument" if ARITY[node.func] == 1 else f"{ARITY[node.func]} arguments"
            shape = f"{node.func}({', '.join('ab'[: ARITY[node.func]])})"
            self.report(f"{node.func} takes {wanted}, {len(args)} given", node.column, cure=f"write {shape}")
            return None
        meanings = [arg for arg in args if arg is not None]
        if len(meanings) != len(args):
            return None
        if node.func in ("sum_k", "sum_v"):
            return self.contraction(node, meanings[0])
        exprs = [m.expr for m in meanings]
        problem = _outside(node.func, exprs[0])
        if problem:
            self.report(problem[0], node.column, cure=problem[1])
            return None
        return self.checked(FUNCTIONS[node.func](*exprs), join_axes(*(m.axes for m in meanings)), node)

    def contraction(self, node: Call, inner: Meaning) -> Meaning | None:
        axis = node.func[-1]
        if axis not in inner.axes:
            self.report(
                f"{node.func} of something that has no axis {axis} (its axes are {inner.axes!r})",
                node.column,
                cure=f"remove {node.func}, or sum something that carries {axis}",
            )
            return None
        return Meaning(CONTRACTIONS[axis](inner.expr), drop_axis(inner.axes, axis))

    def checked(self, expr: sympy.Expr, axes: Axes, node: Node) -> Meaning | None:
        """Refuse what is not a finite real number, and numbers that grow without bound."""
        problem = ""
        if expr.has(sympy.zoo, sympy.oo, -sympy.oo, sympy.nan):
            problem = "the value is not finite"
        elif expr.has(sympy.I):
            problem = "the value is not real"
        elif any(_bits(number) > 2_000 for number in _numbers(expr)) or not _float_range(expr):
            problem = "a number in it is out of range"
        if problem:
            self.report(problem, node.column, cure="check the numbers of this formula")
            return None
        return Meaning(expr, axes)


def _numbers(expr: sympy.Expr) -> Iterable[sympy.Rational]:
    if expr.is_Rational:
        return [expr]
    return [a for a in expr.args if a.is_Rational]


def _bits(number: sympy.Rational) -> int:
    return int(number.p).bit_length() + int(number.q).bit_length()


def _float_range(expr: sympy.Expr) -> bool:
    """False for a constant that a float cannot hold; keeps towers of exponentials out of SymPy's arithmetic."""
    if expr.free_symbols:
        return True
    try:
        value = constant_value(expr)
    except (OverflowError, ValueError, ZeroDivisionError):
        return False
    return math.isfinite(value) and abs(value) < 1e100


_FLOATS: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "Abs": abs,
    "Min": min,
    "Max": max,
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "Softplus": lambda x: math.log1p(math.exp(x)),
    "SumK": lambda x: x,
    "SumV": lambda x: x,
}


def constant_value(expr: sympy.Expr, values: Mapping[str, float] | None = None) -> float:
    """Value of an expression in plain floats (axes of size 1). Raises ValueError, OverflowError or
    ZeroDivisionError where it has none."""
    if expr.is_Symbol:
        return (values or {})[expr.name]
    if expr.is_Number:
        return int(expr.p) / int(expr.q) if expr.is_Rational else float(expr)
    if expr is sympy.E:
        return math.e
    args = [constant_value(a, values) for a in expr.args]
    if expr.is_Add:
        return math.fsum(args)
    if expr.is_Mul:
        return math.prod(args)
    if expr.is_Pow:
        result = args[0] ** args[1]
        if isinstance(result, complex):
            raise ValueError("not real")
        return result
    return _FLOATS[type(expr).__name__](*args)


def _outside(func: str, x: sympy.Expr) -> tuple[str, str] | None:
    if func == "log" and x.is_nonpositive:
        return "log of something that is never positive", "its argument must be positive: check the domains"
    if func == "sqrt" and x.is_negative:
        return "sqrt of something negative", "its argument must be nonnegative: check the domains"
    return None


def rational(value: float) -> sympy.Rational:
    """The exact decimal that a float was spelled with: 0.1 is 1/10."""
    exact = Fraction(repr(value))
    return sympy.Rational(exact.numerator, exact.denominator)
