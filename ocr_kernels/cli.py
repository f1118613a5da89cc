"""The command `ocr-kernels`, which is also `python -m ocr_kernels`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ocr_kernels import __version__, demo, info


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ocr-kernels",
        description="Fused kernels for Object-Contextual Representations (semantic segmentation, not text recognition)",
    )
    parser.add_argument("--version", action="version", version=f"ocr_kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, module, text in (
        ("info", info, "what this machine can run, and why not the rest"),
        ("demo", demo, "train a small OCR network on a photo, with and without the kernels, and draw what it sees"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    status: int = args.main(args)
    return status
