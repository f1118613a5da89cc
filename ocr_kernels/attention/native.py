"""The pixel-region attention's compiled kernels, csrc/attention.

`forward` fills out [B, Dv, *S], `backward` the gradients that are wanted, in their own strides, as those of `reference`
do. Tensors are read in place where their pixels lie at one stride, as they do in contiguous and channels last ones;
others are copied over there.
"""

from __future__ import annotations

from typing import Any

from ocr_kernels.core import libraries

forward: Any = libraries.ops().attention_forward.default
backward: Any = libraries.ops().attention_backward.default
