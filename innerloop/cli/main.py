"""The ``innerloop`` command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from innerloop import __version__

USAGE = """\
innerloop: MAML and MAML++ for any PyTorch model.

  innerloop train [PRESET] [options]    meta-train; without a preset: quickstart, which needs no data
  innerloop evaluate RUN [options]      test a run on held-out classes
  innerloop diagnose RUN [options]      why a run does not learn: what is odd, the likeliest reason first
  innerloop ablate [GRID] [options]     train the rows of a table from several seeds, and write the table
  innerloop report RUN... [options]     tables and figures of recorded runs, as one HTML page
  innerloop presets                     what there is to train
  innerloop adapt RUN DIR --out MODEL   a classifier of your own classes, from a folder of images for each
  innerloop predict MODEL IMAGES...     what images are, by such a classifier
  innerloop export MODEL --out FILE     the classifier for other programs: ONNX, TorchScript, torch.export
  innerloop bench [CASE...] [options]   time and memory of a meta-training step, beside other libraries
  innerloop serve [RUN] [options]       a page to draw a few examples on and watch the network learn them

  innerloop COMMAND --help: every option with its default
  innerloop --version
"""

COMMANDS = (
    "train",
    "evaluate",
    "diagnose",
    "ablate",
    "report",
    "presets",
    "adapt",
    "predict",
    "export",
    "bench",
    "serve",
)
"""Each a module of this package with a function ``run(arguments)`` that returns the exit code."""

# Exit codes, as said in the README: 2 is also what the argument parser itself exits with.
OK, FAILED, BAD_INPUT, DIVERGED, CANNOT_WRITE = 0, 1, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return OK if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"innerloop {__version__}")
        return OK
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")

    # Heavy imports come after the cheap mistakes.
    command = import_module(f"innerloop.cli.{name}")
    from innerloop.training.checkpoints import WriteError
    from innerloop.training.trainer import DivergedError, InterruptedRunError
    from innerloop.training.workers import WorkerError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.captureWarnings(True)

    try:
        code: int = command.run(rest)
        return code
    except DivergedError as error:
        return _fail(str(error), DIVERGED)
    except InterruptedRunError as stop:
        return 128 + stop.signal_number
    except WorkerError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output went away, as `| head` does; what else is written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except WriteError as error:
        return _fail(str(error), CANNOT_WRITE)
    except (ValueError, OSError) as error:
        # Everything a user can mend is one of these: its message says how.
        return _fail(str(error))


def _fail(message: str, code: int = BAD_INPUT) -> int:
    Console(stderr=True).print("[bold red]error:[/]", end=" ")
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
