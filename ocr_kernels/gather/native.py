"""The spatial gather's compiled kernels, csrc/gather.

`forward` fills out [B, C, K] and stats [B, C + 2, K], `backward` the gradients that are wanted, in their own strides,
as those of `reference` do. Tensors are read in place where their pixels lie at one stride, as they do in contiguous and
channels last ones; others are copied over there.
"""

from __future__ import annotations

from typing import Any

from ocr_kernels.core import libraries

forward: Any = libraries.ops().gather_forward.default
backward: Any = libraries.ops().gather_backward.default
