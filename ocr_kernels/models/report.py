"""What a replacement did, a row for each module."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A module that was replaced, what runs it, and what a dry run found."""

    name: str
    module_class: str
    computations: tuple[str, ...] | None = None
    """`"gather"`, `"attention"`; `"block"` and `"training"`, step 4 as one op in inference and in training; `"logits"`,
    a block and a classifier as one. None if it was not run, empty if `example_inputs` did not reach it."""
    backend: str = ""
    """That of the device its parameters are on."""
    max_error: float | None = None
    eager_error: float | None = None
    """What the module's own forward is off in its dtype, as `max_error` against float64."""
    relative_error: float | None = None
    saved_bytes: int | None = None
    """How much less is kept for the backward pass."""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A module that looks like OCR and was not changed."""

    name: str
    module_class: str
    reason: str
    is_intended: bool = False
    """Whether nothing is missing: it was replaced before, calls ocr_kernels itself, or the filter says so."""


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What `replace_ocr_modules` did; `print` it. True if anything was replaced.

    Examples:
        >>> head = reference.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8)
        >>> report = replace_ocr_modules(head, example_inputs=torch.randn(2, 8, 16, 16))
        >>> bool(report), [row.name for row in report.replaced][:2], report.left_alone
        (True, ['', 'ocr_gather_head'], ())
    """

    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def raise_if_incomplete(self) -> None:
        """For a test of a model: `replace_ocr_modules(model, example_inputs=x).raise_if_incomplete()`.

        Raises:
            RuntimeError: with the report, where nothing was replaced, something that looks like OCR was left alone, or
                a replaced module was not run: without example inputs, or by them.
        """
        missing = not self.replaced and not any(row.is_intended for row in self.left_alone)
        missing |= any(not row.is_intended for row in self.left_alone)
        missing |= any(not row.computations for row in self.replaced)
        if missing:
            unseen = any(row.computations is None for row in self.replaced)
            hint = "; give example_inputs, which show what runs fused" if unseen else ""
            raise RuntimeError(f"not every OCR module of the model was replaced{hint}:\n{self}")

    def __str__(self) -> str:
        replaced = [(row.name or "(model)", row.module_class, *_findings(row)) for row in self.replaced]
        left_alone = [(row.name or "(model)", row.module_class, row.reason) for row in self.left_alone]
        nothing = "" if replaced or left_alone else ": nothing in the model looks like OCR"
        lines = [f"{len(replaced)} replaced, {len(left_alone)} left alone{nothing}"]
        if replaced:
            columns = "replaced", "class", "fused", "backend", "error", "eager's own", "relative", "saves", "remarks"
            lines.append(_table(columns, *replaced))
        if left_alone:
            lines.append(_table(("left alone", "class", "because"), *left_alone))
        return "\n".join(lines)


def _findings(row: Replaced) -> tuple[str, ...]:
    fused = ", ".join(row.computations or ())
    if not row.computations:
        fused = "to be seen when it runs" if row.computations is None else "not run by example_inputs"
    is_block = not {"block", "logits"}.isdisjoint(row.computations or ())  # which is faster in plain PyTorch, too
    backend = "reference: not faster" if row.backend == "reference" and not is_block else row.backend
    errors = (row.max_error, row.eager_error, row.relative_error)
    saved = "" if row.saved_bytes is None else f"{round(row.saved_bytes / 2**20, 1) + 0.0:.1f} MiB"
    return (
        fused,
        backend,
        *("" if error is None else f"{error:.1e}" for error in errors),
        saved,
        "; ".join(row.notes),
    )


def _table(*rows: tuple[str, ...]) -> str:
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
