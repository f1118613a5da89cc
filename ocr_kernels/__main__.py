import sys

from ocr_kernels.cli import main

sys.exit(main())
