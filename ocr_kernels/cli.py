"""The command `ocr-kernels`, which is also `python -m ocr_kernels`."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Sequence

from ocr_kernels import __version__, check, demo, info
from ocr_kernels.bench import tune


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every encoding has ±
    try:
        status = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("ocr-kernels: stopped", file=sys.stderr)
        return 130  # as shells have it
    except BrokenPipeError:  # who reads has seen enough, and Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"]:  # its arguments are parsed over there
        return _bench(argv[1:])
    parser = argparse.ArgumentParser(
        prog="ocr-kernels",
        description="Fused kernels for Object-Contextual Representations (semantic segmentation, not text recognition)",
    )
    parser.add_argument("--version", action="version", version=f"ocr_kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, module, text in (
        ("info", info, "what this machine can run, and why not the rest"),
        ("check", check, "replace the OCR modules of your own model: report, error, time and bytes before and after"),
        ("tune", tune, "find faster tiles for this machine's GPU, by timing, which the kernels take from then on"),
        ("demo", demo, "train a small OCR network on a photo, with and without the kernels, and draw what it sees"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    commands.add_parser("bench", help="times beside eager PyTorch, other peers and this machine's floor")
    args = parser.parse_args(argv)
    status: int = args.main(args)
    return status


def _bench(argv: Sequence[str]) -> int:
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"ocr-kernels bench: needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from ocr_kernels.bench import command  # the others need neither

    return command.main(argv)
