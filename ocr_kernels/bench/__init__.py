"""`ocr-kernels bench`: how fast ours is, beside its peers and the machine's floor."""
