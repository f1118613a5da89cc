"""A classifier that alone takes the z of a block: both run as one op, from pixels and regions to logits.

A module that calls a block and then a classifier, both children of its own, gets a copy of its forward in which the
two calls are one: those of `z = self.block(x, f)` and `out = self.classifier(z)`, where nothing else reads `z`.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ocr_kernels.block.layers import is_pointwise
from ocr_kernels.core.calls import is_plain_call
from ocr_kernels.models.rewriting import Rewriter, ask


class Join(NamedTuple):
    """The names of two children, of which the second takes what the first gives."""

    block: str
    classifier: str


def joins_of(module: nn.Module, blocks: Collection[nn.Module]) -> tuple[Join, ...]:
    """Which children may be joined in a module's forward; `blocks` are the modules that run as one op."""
    found: list[Join] = []
    if blocks:
        Rewriter().rewritten(type(module).forward, lambda node, _: found.extend(site.join for site in _sites(node)))
    children = module._modules
    return tuple(
        join
        for join in dict.fromkeys(found)
        if children.get(join.block) in blocks and isinstance(children.get(join.classifier), _CLASSIFIERS)
    )


def joined(module_class: type[nn.Module], joins: tuple[Join, ...]) -> dict[FunctionType, FunctionType]:
    """The copy of a class's forward in which the calls of each of `joins` are one; none if it cannot be made."""
    forward: Any = module_class.forward
    copy = Rewriter().rewritten(forward, functools.partial(_join, joins))
    return {forward: copy} if isinstance(copy, FunctionType) else {}


def _join(joins: tuple[Join, ...], definition: ast.FunctionDef, _: CodeType) -> None:
    for site in list(_sites(definition)):
        if site.join in joins:
            both = ask(
                "classify", site.classifier.func, site.block.func, *site.block.args, keywords=site.block.keywords
            )
            site.put(ast.copy_location(both, site.classifier))
            if site.first is not None:
                site.body.remove(site.first)


def matrix_of(classifier: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """The `[L, O]` matrix and the bias of a 1x1 convolution, also behind dropout in eval mode; None if it is none."""
    if classifier is None or not is_plain_call(classifier):
        return None
    if type(classifier) is nn.Sequential:
        layers = [layer for layer in classifier if not (_does_nothing(layer) and is_plain_call(layer))]
        return matrix_of(layers[0]) if len(layers) == 1 else None
    return (classifier.weight.flatten(1), classifier.bias) if is_pointwise(classifier) else None  # type: ignore[operator, return-value]


_CLASSIFIERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Sequential


def _does_nothing(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity or (
        type(layer) in (nn.Dropout, nn.Dropout2d, nn.Dropout3d) and not layer.training
    )


# Finding the calls


class _Site(NamedTuple):
    """The statements that call a child, if it is one of its own, and another child with the result; and both calls."""

    body: Any  # a list of statements
    first: ast.stmt | None
    put: Callable[[ast.expr], None]  # in place of the call of the classifier
    block: Any
    classifier: Any

    @property
    def join(self) -> Join:
        return Join(self.block.func.attr, self.classifier.func.attr)


def _sites(definition: ast.FunctionDef) -> Iterator[_Site]:
    """Where what one child gives is read by another child alone."""
    this = [*definition.args.posonlyargs, *definition.args.args][0].arg
    bodies = [getattr(node, name, None) for node in ast.walk(definition) for name in ("body", "orelse")]
    for body in filter(None, bodies):
        for first, second in itertools.pairwise([None, *body] if isinstance(body, list) else []):
            if not isinstance(second, (ast.Assign, ast.Return)):
                continue
            for put, value in _values(second):
                classifier = _call_of_child(value, this)
                if classifier is None or len(classifier.args) != 1 or classifier.keywords:
                    continue
                (z,) = classifier.args
                block = _call_of_child(z, this)
                if block is not None:
                    yield _Site(body, None, put, block, classifier)
                elif isinstance(z, ast.Name) and isinstance(first, ast.Assign):
                    block = _call_of_child(first.value, this)
                    is_given = [getattr(target, "id", None) for target in first.targets] == [z.id]
                    if block is not None and is_given and not _is_read_elsewhere(definition, z, second):
                        yield _Site(body, first, put, block, classifier)


def _values(statement: ast.Assign | ast.Return) -> Iterator[tuple[Callable[[ast.expr], None], ast.expr | None]]:
    """What a statement computes, with a way to put something else there: its value, or one beside variables alone."""
    value = statement.value
    yield functools.partial(setattr, statement, "value"), value
    if isinstance(value, (ast.List, ast.Tuple)):
        for i, element in enumerate(value.elts):
            if all(isinstance(other, ast.Name) for other in value.elts if other is not element):
                yield functools.partial(value.elts.__setitem__, i), element


def _call_of_child(node: Any, this: str) -> ast.Call | None:
    """`node` if it is `self.name(...)`."""
    function = getattr(node, "func", None)
    owner = function.value if isinstance(function, ast.Attribute) else None
    return node if isinstance(owner, ast.Name) and owner.id == this else None


def _is_read_elsewhere(definition: ast.FunctionDef, z: ast.Name, second: ast.Assign | ast.Return) -> bool:
    """Whether anything but `second` may read what the variable `z` has there."""
    nodes = list(ast.walk(definition))
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == z.id and node is not z]
    inside = [use for use in uses if use in ast.walk(second)]
    if any(isinstance(use.ctx, ast.Load) for use in inside):
        return True
    for node in nodes[1:]:
        if isinstance(node, (ast.For, ast.While)) and second in ast.walk(node):
            return True
        if isinstance(node, _DEFINITIONS) and any(use in ast.walk(node) for use in uses):
            return True
    changed = [node.target for node in nodes if isinstance(node, ast.AugAssign)]
    after = [use for use in uses if (use.lineno, use.col_offset) > (second.lineno, second.col_offset)]
    read = [use for use in after if not isinstance(use.ctx, ast.Store) or use in changed]
    return not inside and bool(read)  # inside of `second` the variable is given something else


_DEFINITIONS = ast.FunctionDef, ast.Lambda, ast.GeneratorExp
