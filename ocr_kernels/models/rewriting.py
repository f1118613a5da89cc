"""Copies of a module's methods in which the calls that may matter go through a `Recognition`.

The copy of a function has one parameter more, before all others, for the recognition that follows this one call.
Closures, defaults, globals and line numbers are the original's. A copy is made only from source whose code, compiled
again, is all that was imported; what has no copy runs as it is, and is given computed tensors.
"""

from __future__ import annotations

import ast
import copy
import dis
import functools
import inspect
import linecache
import threading
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ocr_kernels.models.recognition import Deferred

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "@", "scaled_dot_product_attention"})
THIS = "_ocr_kernels"
Rewrite = Callable[[ast.FunctionDef, CodeType], None]
"""Changes a definition, whose code is given, in place."""
_OPERATORS: dict[type[ast.operator], str] = {ast.Mult: "mul", ast.Div: "div", ast.MatMult: "matmul"}
_VIEWS = frozenset(
    "size dim numel view reshape flatten unflatten permute transpose contiguous unsqueeze expand format".split()  # noqa: SIM905 (shorter)
)
"""Methods that modify nothing, and ask for no type of what they are called on."""
_ASKED = frozenset({"__class__", "__dict__", "data", "grad"}) | vars(Deferred).keys() - set(dir(Tensor))
_ASKED |= frozenset("call flipped is_result operands origin recognition scale softmaxed spatial value".split())  # noqa: SIM905
"""Attributes for which what stands for a tensor has no answer, or another."""
_DEFINITIONS = ast.FunctionDef, ast.Lambda, ast.GeneratorExp
_parsing = threading.Lock()  # Python's parser counts its depth for all threads together, and fails if that is off
_UNSEEN = (
    *(ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await, ast.Match),
    *(ast.AsyncFunctionDef, ast.ClassDef, ast.AsyncFor, ast.AsyncWith, ast.Try),
)


class Rewriter:
    """Makes the copies for the modules of one model."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[ast.Module, list[CodeType]] | None] = {}
        self._copies: dict[FunctionType, FunctionType | str] = {}
        self._names: dict[FunctionType, frozenset[str]] = {}

    def copies(self, classes: Iterable[type[nn.Module]]) -> dict[FunctionType, FunctionType]:
        """The copies of the classes' forwards and of what these reach."""
        reached = [function for owner in classes for function in self.reached(owner)]
        made = {function: self._copy(function) for function in reached}
        return {function: copy for function, copy in made.items() if isinstance(copy, FunctionType)}

    def rewritten(self, function: Any, rewrite: Rewrite) -> FunctionType | str:
        """A copy of a function whose definition went through `rewrite`, or why there is none."""
        if not isinstance(function, FunctionType):
            return f"its forward is a {type(function).__name__}, not a function"
        try:
            with _parsing:
                found = self._found(function)
                return found if isinstance(found, str) else _compiled(*found, function, rewrite)
        except (OSError, SyntaxError, ValueError, RecursionError, SystemError) as error:
            return f"its source cannot be read: {error}"

    def why_not(self, module_class: type[nn.Module]) -> str | None:
        """Why the forward of a class has no copy."""
        copy = self._copy(inspect.getattr_static(module_class, "forward"))
        return copy if isinstance(copy, str) else None

    def names(self, module_class: type[nn.Module]) -> frozenset[str]:
        """The names in the code of forward and of what it reaches, and the operators in it, as "@"."""
        return frozenset().union(*map(self.names_of, self.reached(module_class)))

    def names_of(self, function: FunctionType) -> frozenset[str]:
        if function not in self._names:
            inner = inspect.unwrap(function)
            names = set(_code_names(inner.__code__))
            named = (getattr(inner.__globals__.get(name), "__name__", "") for name in names)
            self._names[function] = frozenset(names.union(name for name in named if isinstance(name, str)))
        return self._names[function]

    def reached(self, module_class: type[nn.Module]) -> list[FunctionType]:
        """The forward of a class, the methods it calls and functions of the same file, or with computations in them."""
        found: dict[FunctionType, None] = {}
        todo: list[Any] = [inspect.getattr_static(module_class, "forward", None)]
        while todo:
            function = todo.pop()
            inner = _inner(function)
            if not isinstance(inner, FunctionType) or function in found or _is_of_torch(inner):
                continue
            found[function] = None
            for name in self.names_of(function):
                methods = [vars(owner)[name] for owner in module_class.__mro__ if name in vars(owner)]
                above = methods if "super" in self.names_of(function) else methods[:1]
                todo += [getattr(method, "__func__", method) for method in above]
                other = inner.__globals__.get(name)
                if isinstance(other, FunctionType) and not _is_of_torch(_inner(other)):
                    near = inspect.unwrap(other).__code__.co_filename == inner.__code__.co_filename
                    if near or any(n in PRODUCTS or "softmax" in n for n in self.names_of(other)):
                        todo.append(other)
        return list(found)

    def _copy(self, function: FunctionType) -> FunctionType | str:
        """The copy of `function`, or why there is none."""
        if function not in self._copies:
            inner = _inner(function)
            if inner is function:
                self._copies[function] = self.rewritten(function, _follow_calls)
            else:
                copy = self._copy(inner)
                self._copies[function] = _rebound(function, inner, copy) if isinstance(copy, FunctionType) else copy
        return self._copies[function]

    def _found(self, function: FunctionType) -> tuple[ast.Module, ast.FunctionDef] | str:
        """The tree of a function's file, and what defines it there; or why it cannot be followed."""
        code = function.__code__
        if hasattr(function, "__wrapped__"):
            return f"its forward is wrapped by a decorator of {code.co_filename}"
        file = self._file(code.co_filename, function.__globals__)
        if file is None:
            return "its source is not at hand"
        tree, imported = file
        found = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and (node.name, _first_line(node)) == (code.co_name, code.co_firstlineno)
        ]
        if len(found) != 1 or code not in imported:
            return "its source is not what was imported"
        reason = _unseen(found[0])
        if reason is not None or not (code.co_argcount or code.co_posonlyargcount):
            return reason or "it takes no arguments by position"
        return tree, found[0]

    def _file(self, name: str, globals: dict[str, Any]) -> tuple[ast.Module, list[CodeType]] | None:
        """The tree of a file, and the codes that it is compiled to."""
        if name not in self._files:
            source = "".join(linecache.getlines(name, globals))
            tree = ast.parse(source)
            self._files[name] = (tree, list(_codes(compile(tree, name, "exec", dont_inherit=True)))) if source else None
        return self._files[name]


def _is_of_torch(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__", "")).partition(".")[0] == "torch"


def _inner(function: Any) -> Any:
    """What PyTorch's own decorators, `torch.no_grad()` and its like, have wrapped."""
    while (
        isinstance(function, FunctionType)
        and (inner := getattr(function, "__wrapped__", None)) is not None
        and function.__code__.co_filename in _DECORATORS
        and any(cell.cell_contents is inner for cell in function.__closure__ or ())
    ):
        function = inner
    return function


def _wrapper_files() -> frozenset[str]:
    decorated = torch.no_grad()(lambda: None), torch.autocast("cpu")(lambda: None)
    return frozenset(function.__code__.co_filename for function in decorated)


_DECORATORS = _wrapper_files()


def _rebound(wrapper: FunctionType, inner: FunctionType, copy: FunctionType) -> FunctionType:
    """`wrapper` around `copy` instead of `inner`."""
    below = wrapper.__wrapped__  # type: ignore[attr-defined]
    target = copy if below is inner else _rebound(below, inner, copy)
    closure = tuple(CellType(target) if cell.cell_contents is below else cell for cell in wrapper.__closure__ or ())
    return FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("BINARY"):
            operator = instruction.argrepr.removesuffix("=")
            yield {"BINARY_MATRIX_MULTIPLY": "@", "BINARY_MULTIPLY": "*"}.get(instruction.opname, operator)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _first_line(definition: ast.FunctionDef) -> int:
    return min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])


def _unseen(definition: ast.FunctionDef) -> str | None:
    """Why what runs in a function cannot be followed from its source."""
    nodes = list(ast.walk(definition))
    variables = _stored(definition) | {n.arg for n in nodes if isinstance(n, ast.arg)} - {"self"}
    consumed = _consumed(definition)
    for node in nodes[1:]:
        if isinstance(node, _UNSEEN):
            return f"line {node.lineno} of its code has a {type(node).__name__}"
        if isinstance(node, ast.Name) and node.id in ("exec", "eval", "locals", THIS):
            return f"line {node.lineno} of its code has {node.id}"
        if isinstance(node, ast.Attribute) and node.attr in ("numpy", "untyped_storage", "data_ptr"):
            return f"line {node.lineno} of its code has {node.attr}, which gives a tensor's memory away"
        if isinstance(node, _DEFINITIONS) and node not in consumed:
            inside = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            used = (inside & variables) - _stored(node) - {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
            if not isinstance(node, ast.GeneratorExp):  # defaults are made outside
                defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
                used |= variables & {n.id for each in defaults for n in ast.walk(each) if isinstance(n, ast.Name)}
            if used:
                return f"line {node.lineno} of its code has a function that uses {min(used)}"
    return None


def _stored(node: ast.AST) -> set[str]:
    """The variables that are assigned to."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _consumed(definition: ast.FunctionDef) -> set[ast.expr]:
    """The generator expressions whose items go to this function alone."""
    found: set[ast.expr] = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Tuple, ast.List)):
            found.add(node.value)
        elif isinstance(node, ast.For):
            found.add(node.iter)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple"):
            found.update(node.args)
    return {node for node in found if isinstance(node, ast.GeneratorExp)}


def _compiled(
    tree: ast.Module, definition: ast.FunctionDef, function: FunctionType, rewrite: Rewrite
) -> FunctionType | str:
    """The rewritten copy of `function`, whose definition is in its file's tree."""
    code = function.__code__
    before = dict(vars(definition))
    vars(definition).update(vars(copy.deepcopy(definition)))
    try:
        rewrite(definition, code)
        definition.decorator_list = []
        (definition.args.posonlyargs or definition.args.args).insert(0, ast.arg(THIS))
        ast.fix_missing_locations(definition)
        compiled = compile(tree, code.co_filename, "exec", dont_inherit=True)
    finally:
        vars(definition).update(before)
    made = [c for c in _codes(compiled) if c.co_name == code.co_name and c.co_varnames[:1] == (THIS,)]
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    if len(made) != 1 or not cells.keys() >= set(made[0].co_freevars):
        return "its code cannot be made anew"
    closure = tuple(cells[name] for name in made[0].co_freevars)
    result = FunctionType(made[0], function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(result, function)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _follow_calls(definition: ast.FunctionDef, code: CodeType) -> None:
    is_in_modes = bool(definition.decorator_list) or any(isinstance(n, ast.With) for n in ast.walk(definition))
    _Calls(code, _consumed(definition), is_in_modes, _stored(definition)).rewrite(definition)


def ask(name: str, *arguments: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    """A call of the recognition."""
    return ast.Call(ast.Attribute(ast.Name(THIS, ast.Load()), name, ast.Load()), list(arguments), keywords or [])


class _Calls(ast.NodeTransformer):
    """Lets the calls and operators of one function go through the recognition."""

    def __init__(self, code: CodeType, consumed: set[ast.expr], is_in_modes: bool, variables: set[str]) -> None:
        self.first = code.co_varnames[0]  # the function's own first parameter
        self.locals = frozenset(code.co_varnames + code.co_cellvars + code.co_freevars) | variables
        self.consumed = consumed
        self.is_in_modes = is_in_modes
        self.sizes: set[str] = set()  # variables that are given sizes alone

    def rewrite(self, definition: ast.FunctionDef) -> None:
        given: dict[str, list[ast.expr]] = {}
        for node in ast.walk(definition):
            if isinstance(node, ast.Assign):
                for name in set().union(*map(_stored, node.targets)):
                    given.setdefault(name, []).append(node.value)
        otherwise = {
            name
            for node in ast.walk(definition)
            if isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.comprehension, ast.withitem))
            for name in _stored(node)
        }
        for _ in given:
            self.sizes = {n for n, values in given.items() if n not in otherwise and all(map(self._is_size, values))}
        body = [self.visit(statement) for statement in definition.body]
        definition.body = [node for nodes in body for node in (nodes if isinstance(nodes, list) else [nodes])]

    def _left_alone(self, node: Any) -> Any:
        return node

    visit_FunctionDef = visit_Lambda = visit_Delete = _left_alone

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        return self.generic_visit(node) if node in self.consumed else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            if not node.args:  # the recognition is the first argument now
                node.args = [ast.Name("__class__", ast.Load()), ast.Name(self.first, ast.Load())]
            return node
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = function.value
            if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                arguments = *owner.args, ast.Constant(function.attr), *node.args
                return ast.copy_location(ask("above", *arguments, keywords=node.keywords), node)
            if function.attr in _VIEWS and not node.keywords and all(map(self._is_size, node.args)):
                return node
            global_or_self = isinstance(owner, ast.Name) and (owner.id == "self" or owner.id not in self.locals)
            if not global_or_self and not function.attr.startswith("__"):  # which a class may give another name
                arguments = owner, ast.Constant(function.attr), *node.args
                return ast.copy_location(ask("method", *arguments, keywords=node.keywords), node)
        return ast.copy_location(ask("call", function, *node.args, keywords=node.keywords), node)

    def _is_size(self, node: ast.expr) -> bool:
        """Whether an argument is surely no tensor: made of numbers, shapes, and variables that are such."""
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and node.func.attr in ("size", "dim", "numel")
        if isinstance(node, ast.Attribute):
            return node.attr in ("shape", "ndim")
        if isinstance(node, ast.Name):
            return node.id in self.sizes
        if isinstance(node, (ast.Constant, ast.UnaryOp, ast.Subscript, ast.Starred, ast.BinOp, ast.Tuple)):
            parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
            return all(map(self._is_size, parts[:1] if isinstance(node, ast.Subscript) else parts))
        return False

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = _OPERATORS.get(type(node.op))
        return node if name is None else ast.copy_location(ask(name, node.left, node.right), node)

    def visit_With(self, node: ast.With) -> Any:
        modes = [item.context_expr for item in node.items]
        self.generic_visit(node)
        for item, mode in zip(node.items, modes, strict=True):
            if isinstance(mode, ast.Call) and all(map(self._is_size, mode.args)) and not mode.keywords:
                item.context_expr = mode  # is given no tensor
        node.body = [*node.body, ast.copy_location(ast.Expr(ask("compute_all")), node)]
        return [ast.copy_location(ast.Expr(ask("compute_all")), node), node]

    def _leaving(self, node: Any) -> Any:
        return [ast.copy_location(ast.Expr(ask("compute_all")), node), node] if self.is_in_modes else node

    visit_Break = visit_Continue = _leaving

    def visit_Return(self, node: ast.Return) -> Any:
        self.generic_visit(node)
        if node.value is not None and self.is_in_modes:
            node.value = ask("settle", node.value)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        targets = [t for target in node.targets for t in ast.walk(target)]
        before = [self._change(t) for t in targets if isinstance(t, (ast.Attribute, ast.Subscript)) and _is_stored(t)]
        kept = any(isinstance(t, (ast.Attribute, ast.Subscript)) for target in node.targets for t in ast.walk(target))
        self.generic_visit(node)
        if kept:  # outside of this function's own variables
            node.value = ask("settle", node.value)
        return [*before, node]

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        asks = not isinstance(node.ctx, ast.Load) or node.attr in _ASKED
        if asks and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            node.value = ast.copy_location(ask("settle", node.value), node.value)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        if node.value is not None and not isinstance(node.target, ast.Name):
            node.value = ask("settle", node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        target = node.target
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):  # a tensor's memory, perhaps
            named = ast.Attribute(ast.Name(target.value.id, ast.Load()), target.attr, ast.Load())
            before: ast.stmt = ast.copy_location(ast.Expr(ask("before_change", named)), target)
        else:
            before = self._change(target)
        self.generic_visit(node)
        node.value = ask("settle", node.value)
        return [before, node]

    def _change(self, target: ast.expr) -> ast.stmt:
        """Before what `target` names, or is a part of, is modified in place."""
        owner = target if isinstance(target, ast.Name) else target.value  # type: ignore[attr-defined]
        if isinstance(owner, ast.Name) and owner.id == "self" and isinstance(target, ast.Attribute):
            return ast.copy_location(ast.Pass(), target)
        if isinstance(owner, ast.Name):
            change = ask("before_change", ast.Name(owner.id, ast.Load()))
        else:  # is evaluated once, by what changes it
            change = ask("compute_all")
        return ast.copy_location(ast.Expr(change), target)


def _is_stored(target: ast.AST) -> bool:
    return isinstance(getattr(target, "ctx", None), ast.Store)
