"""The ``flexidit`` command: finds the module of the command, and turns bad input into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

TRAINING_COMMANDS = ("fit", "validate", "test", "predict")

COMMANDS = {
    "fit": "train from a config: flexidit fit -c configs/imagenet/class_conditional_xl2.yaml",
    "validate": "validate a checkpoint with a config",
    "test": "test a checkpoint with a config",
    "predict": "predict with a checkpoint and a config",
    "quickstart": "the whole story on real handwritten digits, in a few minutes on a laptop",
    "sample": "pictures from a checkpoint under a schedule or a budget, with what they cost",
    "curve": "quality against FLOPs and latency at several budgets",
    "flops": "what a model, a patch size or a schedule costs",
    "encode": "images or clips, and captions, to shards of latents and embeddings",
    "convert": "official or diffusers weights to flexidit ones, and back",
}

_EPILOG = """two commands to begin with:
  flexidit quickstart
  flexidit flops --model DiT-XL/2 --weak 4 --steps 250 --powerful-steps 70

every command has its own --help with an example; --debug shows the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    # GNU OpenMP's threads spin 300,000 times before they sleep while they wait for one another, which costs small
    # models dearly next to any other busy process. Spinning less costs nothing measurable without one (BENCHMARKS.md).
    # Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "--version"):
        _top_parser().parse_args(args)
        _top_parser().print_help()
        return 0
    try:
        return _dispatch(args[0], args[1:])
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"flexidit {args[0]}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flexidit {args[0]}: interrupted", file=sys.stderr)
        return 130


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    if name in TRAINING_COMMANDS:
        return importlib.import_module("flexidit.commands.training").run([name, *rest])
    command = importlib.import_module(f"flexidit.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"flexidit {name}",
        description=command.HELP,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.configure(parser)
    return command.run(parser.parse_args(rest))


def _top_parser() -> argparse.ArgumentParser:
    from flexidit import __version__

    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="flexidit",
        usage="flexidit COMMAND ...",
        description=f"One diffusion transformer, several patch sizes.\n\ncommands:\n{listing}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flexidit {__version__}")
    return parser


def _sentence(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        reason = (error.strerror or type(error).__name__).lower()
        return f"{error.filename} cannot be used ({reason}); give a path that can be read, or written to"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
