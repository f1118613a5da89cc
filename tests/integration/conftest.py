"""mmcv-lite comes without mmcv's compiled ops, and OCR runs none of them."""

import importlib.machinery
import importlib.util
import sys
from unittest import mock

if importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec("mmcv._ext") is None:
    sys.modules["mmcv._ext"] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec("mmcv._ext", None))
