"""A trained head in ONNX Runtime: replace, train as you like, export; the file needs nothing of this library.

python examples/onnx_runtime.py head.onnx
"""

from __future__ import annotations

import sys

import onnxruntime
import torch

import ocr_kernels
from ocr_kernels.reference import OCRHead  # stands for your own head, in plain PyTorch


def main(file: str) -> None:
    torch.manual_seed(0)
    head = OCRHead(in_channels=32, num_classes=19, mid_channels=64, key_channels=32).eval()
    feats = torch.randn(1, 32, 24, 48)
    print(ocr_kernels.replace_ocr_modules(head, example_inputs=feats))

    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    torch.onnx.export(head, (feats,), file, dynamo=True, dynamic_shapes=({2: height, 3: width},), external_data=False)

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    larger = torch.randn(1, 32, 40, 56)
    found = session.run(None, {session.get_inputs()[0].name: larger.numpy()})
    with torch.inference_mode():
        expected = head(larger)
    error = max(float((torch.from_numpy(a) - b).abs().max()) for a, b in zip(found, expected, strict=True))
    print(f"{file}: logits differ from PyTorch's by {error:.1e} at most, at another size than was exported")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/onnx_runtime.py head.onnx")
    main(sys.argv[1])
