"""One call that lets the OCR modules of a model run on the fused ops, and one that undoes it.

A replaced module keeps its class, parameters, buffers, hooks and `state_dict` keys: what changes is the instance's
`forward`, which computes what the module's own computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ocr_kernels import modules
from ocr_kernels.block.registration import implemented, is_used_on
from ocr_kernels.core.backends import Backend, resolve_backend
from ocr_kernels.core.calls import has_own_forward
from ocr_kernels.models.block_cache import BlockCache
from ocr_kernels.models.block_plan import plan_block, verify
from ocr_kernels.models.block_weights import BlockPlan
from ocr_kernels.models.classifier import Join, joined, joins_of
from ocr_kernels.models.errors import Errors
from ocr_kernels.models.own_code import without_trace
from ocr_kernels.models.recognition import NO_PRODUCT
from ocr_kernels.models.replacement import Replacement, replacement_of
from ocr_kernels.models.report import LeftAlone, Replaced, ReplacementReport
from ocr_kernels.models.rewriting import PRODUCTS, Rewriter
from ocr_kernels.models.trial import Finding, device_of, dry_run, saved_in_training

Filter = Callable[[nn.Module, str], bool]


def replace_ocr_modules(
    model: nn.Module, *, filter: Filter | None = None, example_inputs: Any = None, blocks: bool = True
) -> ReplacementReport:
    """Let every module of `model`, itself included, that computes OCR's gather or attention do so with our ops.

    The computation is recognised while it runs, not by names: a softmax over pixels followed by a product with the
    pixels' features, and a product followed by a softmax over regions and a product with the regions' values, with
    fewer regions than pixels. Everything else in the module's forward runs as it always did. What cannot be followed
    from a module's source is not assumed: it is given computed tensors, or the module is left alone.

    A module that computes the whole of step 4, from pixels and regions to z, runs as one op, `ocr_block`, in eval mode
    where no gradient is wanted, and in training, where it keeps a quarter of what PyTorch does for its backward pass.
    It is found by what it computes, too: its layers are traced, and checked on random weights.
    Where the module around it hands z to a 1x1 convolution alone, both are one op, to logits. What a trained weight,
    another layer, a hook or an attribute changes is seen at the next call.

    Args:
        model: changed in place; repeating the call changes nothing more. `restore_ocr_modules` undoes it.
        filter: `(module, name) -> bool`, whether a module may be replaced.
        example_inputs: what `model` is called with: a tensor, a tuple of arguments or a dict of keyword arguments. A
            dry run then finds out what really ran fused, and its error; modules in which nothing did, or whose outputs
            would be off, are left as they were. Parameters, buffers, attributes, training flags and the random
            states of PyTorch, Python and NumPy stay.
        blocks: whether step 4 may run as one op, in inference and in training.

    Returns:
        What was replaced, what looked like OCR and was left alone, and why.

    Raises:
        TypeError: an argument is of the wrong type; nothing is changed.

    Examples:
        >>> head = reference.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8)
        >>> report = replace_ocr_modules(head, example_inputs=torch.randn(2, 8, 16, 16))
        >>> print(report)
        4 replaced, 0 left alone...
        >>> report.raise_if_incomplete()
    """
    _check_arguments(model, filter, example_inputs)
    with without_trace(model):
        return _replace(model, filter, example_inputs, blocks)


def _replace(model: nn.Module, filter: Filter | None, example_inputs: Any, blocks: bool) -> ReplacementReport:
    rewriter, tried = Rewriter(), example_inputs is not None
    rows: dict[nn.Module, Replaced | LeftAlone | None] = {}
    replacements: dict[nn.Module, Replacement] = {}
    names = {module: name for name, module in model.named_modules()}

    def is_wanted(module: nn.Module) -> bool:
        return filter is None or filter(module, names[module])

    for module, name in names.items():
        found = _replacement(module, rewriter, blocks, is_wanted)
        if isinstance(found, Replacement) and not is_wanted(module):
            found = LeftAlone(name, type(module).__qualname__, "the filter says so", is_intended=True)
        if isinstance(found, Replacement):
            replacements[module] = found
        elif found is not None:
            rows[module] = dataclasses.replace(found, name=name)
    findings, failure = dry_run(model, replacements, example_inputs) if tried and replacements else ({}, None)
    for module, replacement in replacements.items():
        row: Replaced | LeftAlone | None = None
        finding = findings.get(module)
        if replacement.copies:
            started = Replaced(names[module], type(module).__qualname__, backend=_backend(module, model))
            row = _completed(started, finding, failure) if tried else started
        rows[module] = _as_a_block(row, names[module], replacement, finding) if blocks else row
    for module, name in names.items() if blocks else ():
        joining = _joining(module, replacements) if rows.get(module) is None else None
        if joining is not None and is_wanted(module):
            replacements[module], row = joining
            rows[module] = dataclasses.replace(row, name=name)
    for module, replacement in replacements.items():
        row = rows[module]
        if isinstance(row, Replaced):
            replacement.beside_block = any(other.block is not None for other in replacements.values())
            replacement.was_run = bool(row.computations)
            replacement.install()
        for part in _softmax_parts(module, rewriter, is_wanted) if isinstance(rows[module], Replaced) else ():
            if getattr(rows.get(part), "reason", None) == NO_PRODUCT:  # which is the module's own
                rows[part] = None
    return ReplacementReport(
        tuple(row for row in rows.values() if isinstance(row, Replaced)),
        tuple(row for row in rows.values() if isinstance(row, LeftAlone)),
    )


def restore_ocr_modules(model: nn.Module) -> list[str]:
    """Give the replaced modules of `model` their own forwards back; the names of those that were replaced.

    Where another library has wrapped a replaced forward since, the module's own runs inside of what it made.

    Raises:
        TypeError: `model` is no module.

    Examples:
        >>> head = reference.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8)
        >>> report = replace_ocr_modules(head)
        >>> restore_ocr_modules(head)
        ['', 'ocr_gather_head', 'ocr_distri_head', 'ocr_distri_head.object_context_block']
    """
    _check_arguments(model, None, None)
    replaced = [(name, module, replacement_of(module)) for name, module in model.named_modules()]
    for _, module, replacement in replaced:
        if replacement is not None and replacement.module is module:
            replacement.remove()
        elif replacement is not None:
            replacement.remove_from(module)
    return [name for name, _, replacement in replaced if replacement is not None]


def _check_arguments(model: object, filter: object, example_inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), but is {type(filter).__name__}")
    if not isinstance(example_inputs, (Tensor, tuple, dict, type(None))):
        raise TypeError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"but is {type(example_inputs).__name__}"
        )


# Which modules may contain the computations


def _replacement(
    module: nn.Module, rewriter: Rewriter, blocks: bool, is_wanted: Callable[[nn.Module], bool]
) -> Replacement | LeftAlone | None:
    """What may stand in for a module's forward; or why nothing can; or None where nothing in it looks like OCR."""
    kind = type(module)
    before = replacement_of(module)
    if before is not None:
        unseen = "" if before.was_run else ", and no example_inputs have run it: restore it first, to give some that do"
        return LeftAlone("", kind.__qualname__, f"it was replaced before{unseen}", is_intended=before.was_run)
    if isinstance(module, (modules.SpatialGather, modules.ObjectAttentionBlock)):
        return LeftAlone("", kind.__qualname__, "it calls ocr_kernels itself", is_intended=True)
    if isinstance(module, torch.jit.ScriptModule):
        graph = str(getattr(module, "inlined_graph", ""))
        if "aten::softmax" in graph and any(f"aten::{name}" in graph for name in PRODUCTS):
            return LeftAlone("", kind.__qualname__, "it is a script of torch.jit, whose code is not Python's")
        return None
    parts = _softmax_parts(module, rewriter, is_wanted)
    reason = _why_not(module, bool(parts), rewriter)
    if reason is None:
        classes = tuple(dict.fromkeys([kind, *map(type, parts)]))
        return Replacement(module, classes, rewriter.copies(classes))
    if blocks and reason == "" and _may_be_a_block(module, rewriter):
        return Replacement(module, (), {})
    return LeftAlone("", kind.__qualname__, reason) if reason else None


def _why_not(module: nn.Module, has_parts: bool, rewriter: Rewriter) -> str | None:
    """Why a module's own computations cannot be recognised: empty where it has none, None where they can."""
    if type(module).forward is modules.SpatialOCR.forward:
        return ""
    names = rewriter.names(type(module))
    if not computes_softmax(names) and not has_parts:
        return "it takes a sigmoid, not a softmax" if "sigmoid" in names and names & PRODUCTS else ""
    if not names & PRODUCTS:
        summed = computes_softmax(names) and "sum" in names and "*" in names
        return "it sums what it multiplies by a softmax, which is not recognised as a product" if summed else ""
    if has_own_forward(module):
        return "its forward is the instance's own, not its class's"
    return rewriter.why_not(type(module))


def computes_softmax(names: frozenset[str]) -> bool:
    return any("softmax" in name.lower() for name in names) or "scaled_dot_product_attention" in names


def _softmax_parts(module: nn.Module, rewriter: Rewriter, is_wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The children that may take a softmax for the module's own product; one with products is asked for."""
    names = rewriter.names(type(module))
    if not names & PRODUCTS:
        return []
    parts = (part for name in names & module._modules.keys() for part in module.get_submodule(name).modules())
    parts = (part for part in parts if isinstance(part, nn.Softmax) or computes_softmax(rewriter.names(type(part))))
    return [part for part in parts if not rewriter.names(type(part)) & PRODUCTS or is_wanted(part)]


def _may_be_a_block(module: nn.Module, rewriter: Rewriter) -> bool:
    """Whether a module has layers around an attention of its children."""
    if any(map(is_lazy, module.parameters())):
        return False
    matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
    return matrices >= 5 and any(
        isinstance(part, modules.ObjectAttentionBlock)
        or (rewriter.names(type(part)) & PRODUCTS and computes_softmax(rewriter.names(type(part))))
        for part in module.modules()
    )


def _backend(module: nn.Module, model: nn.Module, *backends: Backend) -> str:
    """The backend that will run a module on its device, one of `backends` if any are named."""
    has_tensors = next(module.parameters(), None) is not None
    device = device_of(module if has_tensors else model)
    try:
        return resolve_backend(device, None, *([backends] if backends else []))
    except RuntimeError as error:
        return str(error)


# What a dry run and a trace found out


def _completed(row: Replaced, finding: Finding | None, failure: str | None) -> Replaced | LeftAlone:
    """The row of a module whose own computations may run fused, after a dry run."""
    if finding is None:
        if failure is not None:
            return LeftAlone(row.name, row.module_class, f"the dry run failed before it was called: {failure}")
        return dataclasses.replace(row, computations=())
    errors, fused = finding.errors, tuple(dict.fromkeys(finding.log.fused))
    reason = finding.failure or ("; ".join(finding.log.reasons()) or "neither computation ran" if not fused else None)
    if reason is None and errors is not None:
        reason = errors.why_not()
    if reason is not None or errors is None:
        return LeftAlone(row.name, row.module_class, str(reason))
    return dataclasses.replace(
        row,
        computations=fused,
        max_error=errors.error,
        eager_error=errors.eager_error,
        relative_error=errors.relative_error,
        saved_bytes=finding.saved_bytes,
        notes=finding.log.reasons(),
    )


def _as_a_block(
    row: Replaced | LeftAlone | None, name: str, replacement: Replacement, finding: Finding | None
) -> Replaced | LeftAlone | None:
    """The row of a module that may be the whole of step 4; its replacement gets the plan."""
    module = replacement.module
    given = [*finding.args, *finding.kwargs.values()] if finding is not None else []
    example = tuple(given) if len(given) == 2 and all(isinstance(x, Tensor) for x in given) else None
    plan = plan_block(module, example)
    if isinstance(plan, BlockPlan):
        block = BlockCache(plan)
        not_in_training = block.plan_training(module)
        if not is_used_on(device_of(module)):
            not_in_training = not_in_training or f"it has no kernels for {device_of(module).type}"
        errors: Errors | str
        if plan.folds:
            errors = verify(module, plan, example)
        else:
            compute = None if block.training is None else block.training.compute
            errors = not_in_training or verify(module, plan, example, compute=compute)
        if not isinstance(errors, str):
            replacement.block = block
            block.watch(module)
            before = row.computations if isinstance(row, Replaced) else ()
            found = row if isinstance(row, Replaced) else Replaced(name, type(module).__qualname__)
            backend = _backend(module, module, *plan.backends(device_of(module).type))
            backends = dict.fromkeys([found.backend, backend])
            if not_in_training:
                found = dataclasses.replace(found, notes=(*found.notes, f"no block in training: {not_in_training}"))
            elif finding is not None and finding.own_bytes is not None:
                found = dataclasses.replace(found, saved_bytes=saved_in_training(replacement, finding))
            return dataclasses.replace(
                found,
                computations=("block", *([] if not_in_training else ["training"]), *(before or ())),
                backend=", ".join(filter(None, backends)),
                max_error=max(errors.error, found.max_error or 0.0),
                eager_error=None if errors.eager_error is None else max(errors.eager_error, found.eager_error or 0.0),
                relative_error=max(errors.relative_error, found.relative_error or 0.0),
            )
        plan = errors
    if isinstance(row, Replaced) and plan:
        return dataclasses.replace(row, notes=(*row.notes, f"no block: {plan}"))
    if row is not None:
        return row
    return LeftAlone(name, type(module).__qualname__, f"no block: {plan}", is_intended=True) if plan else None


def _joining(module: nn.Module, replacements: dict[nn.Module, Replacement]) -> tuple[Replacement, Replaced] | None:
    """What lets a module call a block of its children and a classifier as one, if it does; and its row."""
    found = {child: replacements[child].block for child in module.children() if child in replacements}
    plans = {child: block.plan for child, block in found.items() if block is not None and block.plan is not None}
    plans = {child: plan for child, plan in plans.items() if plan.folds}
    joins: list[Join] = []
    worst = Errors(0.0, None, 0.0, 0.0)
    for join in () if has_own_forward(module) else joins_of(module, plans):
        block, classifier = module.get_submodule(join.block), module.get_submodule(join.classifier)
        errors = verify(block, plans[block], classifier=classifier)
        if not isinstance(errors, str):
            joins.append(join)
            worst = max(worst, errors, key=lambda each: each.error)
    copies = joined(type(module), tuple(joins)) if joins else {}
    if not copies:
        return None
    backend = _backend(module, module, *implemented(device_of(module).type))
    row = Replaced("", type(module).__qualname__, ("logits",), backend, *worst[:3])
    return Replacement(module, (type(module),), copies, joins=tuple(joins)), row
