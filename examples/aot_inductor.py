"""A head as a compiled package that a server loads without Python source: torch.export, then AOTInductor.

python examples/aot_inductor.py head.pt2
"""

from __future__ import annotations

import sys

import torch

import ocr_kernels
from ocr_kernels.reference import OCRHead  # stands for your own head, in plain PyTorch


def main(file: str) -> None:
    torch.manual_seed(0)
    head = OCRHead(in_channels=32, num_classes=19, mid_channels=64, key_channels=32).eval()
    feats = torch.randn(1, 32, 24, 48)
    ocr_kernels.replace_ocr_modules(head, example_inputs=feats)

    with torch.no_grad():
        program = torch.export.export(head, (feats,))
        torch._inductor.aoti_compile_and_package(program, package_path=file)
        found, expected = torch._inductor.aoti_load_package(file)(feats), head(feats)
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    print(f"{file}: logits differ from PyTorch's by {error:.1e} at most")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/aot_inductor.py head.pt2")
    main(sys.argv[1])
