"""mmsegmentation's OCRNet on Cityscapes as it comes, with its OCR modules on the fused ops.

python tools/train.py examples/mmseg_ocrnet.py, where tools/train.py is mmsegmentation's
"""

_base_ = "mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py"

custom_imports = dict(imports=["ocr_kernels.integrations.mmseg"])
custom_hooks = [dict(type="ReplaceOCRModules", example_inputs=(1, 3, 512, 1024))]
