"""The same recognition without a mode: a copy of a module's methods in which single calls go through `recognition`.

A mode is asked about every operation, at a microsecond or more each. Where the source of a forward is at hand and
shows all calls that matter, copies of it and of the methods it calls are compiled in which those calls, and only
those, are made by the functions below. Line numbers, closures, defaults and globals are the original's.
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

from ocr_kernels.recognition import HANDLERS, Deferred, current

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


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Mult: "_ocr_kernels_mul",
    ast.Div: "_ocr_kernels_div",
    ast.MatMult: "_ocr_kernels_matmul",
}
FUNCTIONS = {
    "_ocr_kernels_call": staticmethod(_call),
    "_ocr_kernels_apply": staticmethod(_apply),
    "_ocr_kernels_mul": staticmethod(_operator(operator.mul)),
    "_ocr_kernels_div": staticmethod(_operator(operator.truediv)),
    "_ocr_kernels_matmul": staticmethod(_operator(operator.matmul)),
}
"""What rewritten methods call; attributes that their class has to have."""


@functools.cache
def rewritten_methods(module_class: type[nn.Module]) -> dict[str, FunctionType] | None:
    """Copies of the forward of a class and of the methods it calls; None where only the mode sees what matters."""
    copies: dict[str, FunctionType] = {}
    for name, function in (_methods(module_class) or {}).items():
        copy = _rewritten(function)
        if copy is None:
            return None
        copies[name] = copy
    return copies or None


def _methods(module_class: type[nn.Module]) -> dict[str, FunctionType] | None:
    """Forward and every method that it may call by name; None where one of them is no plain function."""
    methods: dict[str, FunctionType] = {}
    reached = ["forward"]
    while reached:
        name = reached.pop()
        owner = next((owner for owner in module_class.__mro__ if name in vars(owner)), None)
        if name in methods or owner is None or owner is nn.Module or owner is object:
            continue
        method = vars(owner)[name]
        if isinstance(method, (property, classmethod, staticmethod)):
            return None
        if not isinstance(method, FunctionType):
            continue
        called = set(_names(method.__code__))
        neighbours = (method.__globals__.get(other) for other in called)
        if called & {"super", "Softmax"} or any(
            isinstance(other, FunctionType) and other.__code__.co_filename == method.__code__.co_filename
            for other in neighbours
        ):
            return None
        methods[name] = method
        reached += called
    return methods


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _rewritten(function: FunctionType) -> FunctionType | None:
    """A copy of `function`; None where its source is not at hand, or may modify something in place."""
    file, line = function.__code__.co_filename, function.__code__.co_firstlineno
    try:
        tree = ast.parse("".join(linecache.getlines(file, function.__globals__)))
    except (SyntaxError, ValueError):
        return None
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (function.__code__.co_name, line)
    ]
    if len(found) != 1 or found[0].decorator_list or not function.__code__.co_argcount or _modifies(found[0]):
        return None
    as_it_is = _compiled(tree, function)
    if as_it_is is None or as_it_is.co_code != function.__code__.co_code:
        return None  # the file is not what was imported
    _Rewriter(function.__code__.co_varnames[0]).visit(found[0])
    code = _compiled(ast.fix_missing_locations(tree), function)
    if code is None:
        return None
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


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


class _Rewriter(ast.NodeTransformer):
    def __init__(self, this: str) -> None:
        self.this = this  # the method's first parameter

    def call(self, node: ast.AST, name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.AST:
        function = ast.Attribute(ast.Name(self.this, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(function, arguments, keywords), node)

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
