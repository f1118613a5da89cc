"""The public call: `spatial_gather`."""

from __future__ import annotations

from torch import Tensor

from ocr_kernels.core.arguments import check_tensors, is_dtensor, split_scale
from ocr_kernels.core.backends import Backend, resolve_backend
from ocr_kernels.core.registration import exportable
from ocr_kernels.gather.registration import spatial_gather_op


def spatial_gather(
    feats: Tensor, logits: Tensor, scale: float | Tensor = 1.0, *, backend: Backend | None = None
) -> Tensor:
    """Region representations: each region's average pixel, weighted by a softmax **over pixels** (Eq. 4).

        f_k = sum_i m_ki x_i,    m_ki = softmax_i(scale * M_ki)

    Args:
        feats: pixel representations x, `[B, C, *S]`, any number of spatial dimensions.
        logits: soft object regions M, `[B, K, *S]`, before any softmax; any K >= 1. It may have another
            floating dtype than `feats` (float32 logits beside bfloat16 feats is usual).
        scale: factor on the logits; a tensor of one element is trained like any other factor.
        backend: `"reference"`, `"triton"` or `"native"`; `None` chooses (see `ocr_kernels.use_backend`).

    Returns:
        f, `[B, C, K]`, contiguous, in the dtype of `feats`. float64, float32, bfloat16 and float16 are
        accepted; sums and softmax statistics are float32, or float64 if an input is.

    DTensors may be sharded over images and pixels: of pixels each process sums its own, and the sums are reduced.

    Under autocast `feats` is cast to the autocast dtype and `logits` are taken as they are. Forward and
    backward are bitwise reproducible. Saved for backward: the inputs, and for each region two numbers and the result
    before it is rounded to `feats.dtype`.

    Raises:
        TypeError: an argument is no tensor, or of another dtype, or `scale` is no number.
        ValueError: shapes or devices do not match, C or K is 0, or `backend` is unknown.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Examples:
        >>> feats, logits = torch.randn(2, 512, 32, 64), torch.randn(2, 19, 32, 64)
        >>> spatial_gather(feats, logits).shape
        torch.Size([2, 512, 19])
    """
    check_tensors(feats=feats, logits=logits)
    logits, factor = split_scale(scale, logits)
    if is_dtensor(feats):
        from ocr_kernels.gather.sharding import gather

        return gather(feats, logits, factor, resolve_backend(feats.device, backend))
    out: Tensor = exportable(spatial_gather_op)(feats, logits, factor, resolve_backend(feats.device, backend))[0]
    return out
