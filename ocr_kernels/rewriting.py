"""The same recognition without a mode: a copy of a module's methods in which single calls go through `recognition`.

A mode is asked about every operation, at a microsecond or more each. Where the source of a forward is at hand and
shows all calls that matter, copies of it and of the methods it calls are compiled in which those calls, and only
those, are made by the functions below. Line numbers, closures, defaults and globals are the original's.

The statements that most heads share, a softmax of scores and the product that follows it, make one call.
"""

from __future__ import annotations

import ast
import functools
import linecache
import operator
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from ocr_kernels.recognition import HANDLERS, PRODUCT, SOFTMAX, Deferred, current

NAMES = frozenset(function.__name__ for function in HANDLERS if not function.__name__.startswith("__"))
_TENSORS = Tensor, nn.Parameter, Deferred


def _call(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """`owner.name(*args, **kwargs)`"""
    if type(owner) not in _TENSORS:
        return _apply(getattr(owner, name), *args, **kwargs)
    recognition = current()
    result = None if recognition is None else recognition.handle(getattr(Tensor, name), (owner, *args), kwargs)
    return getattr(owner, name)(*args, **kwargs) if result is None else result


def _apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`"""
    recognition = current()
    result = None if recognition is None else recognition.handle(function, args, kwargs)
    return function(*args, **kwargs) if result is None else result


def _operator(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def operate(left: Any, right: Any) -> Any:
        if type(left) in _TENSORS or type(right) in _TENSORS:
            recognition = current()
            result = None if recognition is None else recognition.handle(function, (left, right), {})
            if result is not None:
                return result
        return function(left, right)

    return operate


def _weighted(scores: Any, scale: Any, softmax: Any, dim: Any, by_name: bool, product: Any, values: Any) -> Any:
    """`product(softmax(scale * scores, dim=dim), values)`, with no factor where `scale` is None"""
    recognition = current()
    if (
        recognition is not None
        and type(dim) is int
        and dim in (2, -1)
        and HANDLERS.get(product) is PRODUCT
        and HANDLERS.get(softmax) is SOFTMAX
    ):
        result = recognition.weighted(scores, 1.0 if scale is None else scale, values)
        if result is not None:
            return result
    return _one_by_one(scores, scale, softmax, dim, by_name, product, values)


def _attended(
    first: Any, query: Any, key: Any, scale: Any, softmax: Any, dim: Any, by_name: bool, product: Any, values: Any
) -> Any:
    """`product(softmax(scale * first(query, key), dim=dim), values)`"""
    recognition = current()
    if (
        recognition is not None
        and type(dim) is int
        and dim in (2, -1)
        and HANDLERS.get(first) is HANDLERS.get(product) is PRODUCT
        and HANDLERS.get(softmax) is SOFTMAX
    ):
        result = recognition.attended(query, key, 1.0 if scale is None else scale, values)
        if result is not None:
            return result
    return _one_by_one(_apply(first, query, key), scale, softmax, dim, by_name, product, values)


def _one_by_one(scores: Any, scale: Any, softmax: Any, dim: Any, by_name: bool, product: Any, values: Any) -> Any:
    scores = scores if scale is None else _multiply(scale, scores)
    weights = _apply(softmax, scores, dim=dim) if by_name else _apply(softmax, scores, dim)
    return _apply(product, weights, values)


_multiply = _operator(operator.mul)
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Mult: "_ocr_kernels_mul",
    ast.Div: "_ocr_kernels_div",
    ast.MatMult: "_ocr_kernels_matmul",
}
FUNCTIONS = {
    "_ocr_kernels_call": staticmethod(_call),
    "_ocr_kernels_apply": staticmethod(_apply),
    "_ocr_kernels_mul": staticmethod(_multiply),
    "_ocr_kernels_div": staticmethod(_operator(operator.truediv)),
    "_ocr_kernels_matmul": staticmethod(_operator(operator.matmul)),
    "_ocr_kernels_weighted": staticmethod(_weighted),
    "_ocr_kernels_attended": staticmethod(_attended),
}
"""What rewritten methods call; attributes that their class has to have."""


@functools.cache
def rewritten_methods(module_class: type[nn.Module]) -> dict[str, FunctionType] | None:
    """Copies of the forward of a class and of the methods it calls; None where only the mode sees what matters."""
    copies: dict[str, FunctionType] = {}
    reached = [("forward", 0)]  # a method, and the place in the order of classes from which on it is looked for
    while reached:
        name, start = reached.pop()
        classes = module_class.__mro__[: module_class.__mro__.index(nn.Module)]
        found = next((i for i, owner in enumerate(classes) if i >= start and name in vars(owner)), len(classes))
        method = vars(classes[found])[name] if found < len(classes) else None
        key = _key(name, start)
        if isinstance(method, (property, classmethod, staticmethod)):
            return None
        if not isinstance(method, FunctionType) or key in copies:
            if start and key not in copies:
                return None
            continue
        called = set(_names(method.__code__))
        neighbours = (method.__globals__.get(other) for other in called)
        if "Softmax" in called or any(
            isinstance(other, FunctionType) and other.__code__.co_filename == method.__code__.co_filename
            for other in neighbours
        ):
            return None
        copy, above = _rewritten(method, found + 1)
        if copy is None:
            return None
        copies[key] = copy
        reached += [(other, 0) for other in called] + [(other, found + 1) for other in above]
    return copies or None


def _key(name: str, start: int) -> str:
    """The attribute for a method that `super` finds from this class on."""
    return f"_ocr_kernels_super_{start}_{name}" if start else name


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _rewritten(function: FunctionType, start: int) -> tuple[FunctionType | None, set[str]]:
    """A copy of `function`, and the methods that it calls by `super()`, which looks from the class at `start` on.

    None for the copy where the source is not at hand, or may modify something in place.
    """
    file, line = function.__code__.co_filename, function.__code__.co_firstlineno
    try:
        tree = ast.parse("".join(linecache.getlines(file, function.__globals__)))
    except (SyntaxError, ValueError):
        return None, set()
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (function.__code__.co_name, line)
    ]
    if len(found) != 1 or found[0].decorator_list or not function.__code__.co_argcount or _modifies(found[0]):
        return None, set()
    as_it_is = _compiled(tree, function)
    if as_it_is is None or as_it_is.co_code != function.__code__.co_code:
        return None, set()  # the file is not what was imported
    this = function.__code__.co_varnames[0]
    _join(found[0], this)
    rewriter = _Rewriter(this, start)
    rewriter.visit(found[0])
    code = _compiled(ast.fix_missing_locations(tree), function)
    if code is None or "super" in _names(code):
        return None, set()
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy, rewriter.above


def _compiled(tree: ast.Module, function: FunctionType) -> CodeType | None:
    """The code of `function` in that of its file."""
    reached = [compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)]
    wanted = function.__code__.co_name, function.__code__.co_firstlineno
    while reached:
        code = reached.pop()
        if (code.co_name, code.co_firstlineno) == wanted:
            return code
        reached += (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return None


def _modifies(definition: ast.AST) -> bool:
    """Whether something may be modified in place, of which a deferred call would have to know."""
    for node in ast.walk(definition):
        if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)):
            return True
        if isinstance(node, ast.keyword) and node.arg in ("out", "inplace"):
            return True
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in ("exec", "eval", "locals", "__dict__") or (name.endswith("_") and not name.startswith("_")):
                return True
    return False


_UNORDERED = (
    *(ast.For, ast.While, ast.Try, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    *(ast.Global, ast.Nonlocal),
)


def _join(definition: ast.FunctionDef, this: str) -> None:
    """Make one call of a softmax, the product that follows it and, if it is one, the product whose softmax it is."""
    nodes = list(ast.walk(definition))
    if any(
        isinstance(node, _UNORDERED) or (isinstance(node, ast.FunctionDef) and node is not definition) for node in nodes
    ):
        return  # no order of lines tells what runs later
    variables = [node for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)]
    for body in (value for node in nodes for value in vars(node).values() if isinstance(value, list)):
        for i in range(len(body) - 2, -1, -1):
            softmax = _assigned(body[i], "softmax")
            product = _leftmost_product(body[i + 1]) if softmax is not None else None
            if softmax is None or product is None or not _is(product.args[0], name := body[i].targets[0].id):
                continue
            if any(v.id == name and _position(v) > _position(product.args[0]) for v in variables):
                continue  # the weights are used again
            dim = softmax.args[1:] + [keyword.value for keyword in softmax.keywords if keyword.arg == "dim"]
            if len(dim) != 1 or len(softmax.args) + len(softmax.keywords) != 2:
                continue
            by_name = ast.Constant(bool(softmax.keywords))
            scores, scale = _factors(softmax.args[0], name)
            start, first = i, None
            if _is(scores, name) and i > 0:
                if scale is None and (found := _scaling(body[i - 1], name)) is not None:
                    start, scale = i - 1, found
                first = _assigned(body[start - 1], "matmul", "bmm") if start > 0 else None
                if first is not None and (not _is(body[start - 1].targets[0], name) or not _has_two_arguments(first)):
                    first = None
            if first is None:
                start, (scores, scale) = i, _factors(softmax.args[0], name)
            arguments = [*([first.func, *first.args] if first else [scores]), scale or ast.Constant(None)]
            product.args = [*arguments, softmax.func, dim[0], by_name, product.func, product.args[1]]
            attribute = "_ocr_kernels_attended" if first else "_ocr_kernels_weighted"
            product.func = ast.copy_location(ast.Attribute(ast.Name(this, ast.Load()), attribute, ast.Load()), product)
            del body[start - 1 if first else i : i + 1]
            return


def _assigned(statement: ast.AST, *names: str) -> ast.Call | None:
    """The call of one of these functions whose result the statement assigns to a variable."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        call = statement.value
        if isinstance(call, ast.Call) and call.args and _name(call.func) in names:
            return call
    return None


def _name(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _position(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _has_two_arguments(call: ast.Call) -> bool:
    return len(call.args) == 2 and not call.keywords and not any(isinstance(a, ast.Starred) for a in call.args)


def _leftmost_product(statement: ast.AST) -> ast.Call | None:
    """The product that a statement computes first: `f(a, b)` of `return f(a, b).permute(0, 2, 1)`."""
    node = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Call) and _name(node.func) in ("matmul", "bmm") and _has_two_arguments(node):
            return node
        node = node.func if isinstance(node, ast.Call) else node.value
    return None


def _factors(node: ast.expr, name: str) -> tuple[ast.expr, ast.expr | None]:
    """Scores and their factor: `name`, or else the right one, is the scores."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return node, None
    return (node.left, node.right) if _is(node.left, name) else (node.right, node.left)


def _scaling(statement: ast.AST, name: str) -> ast.expr | None:
    """x where the statement is `name = x * name`, perhaps under an `if`."""
    if isinstance(statement, ast.If) and len(statement.body) == 1 and not statement.orelse:
        factor = _scaling(statement.body[0], name)
        return None if factor is None else ast.IfExp(statement.test, factor, ast.Constant(None))
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1 and _is(statement.targets[0], name)):
        return None
    scores, factor = _factors(statement.value, name)
    return factor if _is(scores, name) else None


class _Rewriter(ast.NodeTransformer):
    def __init__(self, this: str, start: int) -> None:
        self.this = this  # the method's first parameter
        self.start = start
        self.above: set[str] = set()

    def call(self, node: ast.AST, name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.AST:
        function = ast.Attribute(ast.Name(self.this, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(function, arguments, keywords), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        owner = node.value
        if isinstance(owner, ast.Call) and _name(owner.func) == "super" and not owner.args:
            self.above.add(node.attr)
            this = ast.Name(self.this, ast.Load())
            return ast.copy_location(ast.Attribute(this, _key(node.attr, self.start), node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in NAMES:
            arguments = [function.value, ast.Constant(function.attr), *node.args]
            return self.call(node, "_ocr_kernels_call", arguments, node.keywords)
        if isinstance(function, ast.Name) and function.id in NAMES:
            return self.call(node, "_ocr_kernels_apply", [function, *node.args], node.keywords)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = _OPERATORS.get(type(node.op))
        return node if name is None else self.call(node, name, [node.left, node.right], [])
