"""The public call: `pixel_region_attention`."""

from __future__ import annotations

from torch import Tensor

from ocr_kernels.attention.registration import pixel_region_attention_op
from ocr_kernels.core.arguments import check_tensors, is_dtensor, split_scale
from ocr_kernels.core.backends import Backend, resolve_backend
from ocr_kernels.core.registration import exportable


def pixel_region_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """Context of every pixel: the regions' values, weighted by a softmax **over regions** (Eqs. 3 and 5).

        y_i = sum_k w_ik v_k,    w_ik = softmax_k(scale * q_i . k_k)

    Args:
        query: transformed pixels phi(x), `[B, D, *S]`, any number of spatial dimensions.
        key: transformed regions psi(f), `[B, D, K]`; any K >= 1.
        value: transformed regions delta(f), `[B, Dv, K]`; Dv may differ from D.
        scale: factor on the scores; `None` means `D ** -0.5`; a tensor of one element is trained like any other factor.
        backend: `"reference"`, `"triton"` or `"native"`; `None` chooses (see `ocr_kernels.use_backend`).

    Returns:
        y, `[B, Dv, *S]`, in the dtype and the memory format (contiguous or channels last) of `query`.
        float64, float32, bfloat16 and float16 are accepted; sums and softmax statistics are float32, or
        float64 for float64.

    DTensors may be sharded over images, or the query over pixels beside a replicated key and value.

    Under autocast all three tensors are cast to the autocast dtype. Forward and backward are bitwise
    reproducible. Saved for backward: the inputs alone.

    Raises:
        TypeError: an argument is no tensor, the dtypes differ or are others, or `scale` is no number.
        ValueError: shapes or devices do not match, D, Dv or K is 0, or `backend` is unknown.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Examples:
        >>> query, key, value = torch.randn(2, 256, 32, 64), torch.randn(2, 256, 19), torch.randn(2, 256, 19)
        >>> pixel_region_attention(query, key, value).shape
        torch.Size([2, 256, 32, 64])
    """
    check_tensors(query=query, key=key, value=value)
    if scale is not None:
        query, scale = split_scale(scale, query)
    if is_dtensor(query):
        from ocr_kernels.attention.sharding import check_dtensors

        check_dtensors(query=query, key=key, value=value)
    op = exportable(pixel_region_attention_op)
    out: Tensor = op(query, key, value, scale, resolve_backend(query.device, backend))
    return out
