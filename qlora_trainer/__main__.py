"""`python -m qlora_trainer [command] recipe=NAME key=value …`: argv -> command -> exit code.

The configuration is composed and checked before the command's module, and with it torch, is imported:
bad input ends in a second. Exit codes are those of `errors.py`; only here do errors become text.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from textwrap import indent

from qlora_trainer import __version__, commands
from qlora_trainer.errors import ConfigError, PreemptedError, explained
from qlora_trainer.system.quiet import quiet_libraries
from qlora_trainer.system.redact import masked_output
from qlora_trainer.system.streams import lasting_output

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set by accelerate and torchrun
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

USAGE = """\
usage: python -m qlora_trainer [command] recipe=NAME [key=value …] [-v] [-m]

Without a command: train. Running the same line again resumes.

commands:
{commands}

recipes (also ./recipes/NAME.yaml, and recipe=a/path.yaml):
{recipes}

keys:
  any of a recipe, e.g. lora.r=16 data.path=/a/file.json; `recipes recipe=NAME` shows them all
options:
  -m, --multirun   run all combinations of key=a,b,c one after another, each in a folder of its own
  -v, --verbose    show tracebacks (also QLORA_TRACEBACK=1)
  --version        print the version
several GPUs:
  accelerate launch --multi_gpu --num_processes N -m qlora_trainer recipe=NAME …"""


@dataclass
class Line:
    """A command line, taken apart."""

    command: str = "train"
    keys: list[str] = field(default_factory=list)
    verbose: bool = False
    multirun: bool = False
    wants: str = ""  # help | version


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    with lasting_output(), masked_output():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    verbose = bool({"-v", "--verbose"} & set(argv)) or os.environ.get("QLORA_TRACEBACK", "0") not in ("", "0")
    try:
        code = _run(_read(argv))
        sys.stdout.flush()  # here, where a disk that refuses it is an error, and not at the interpreter's end
        return code
    except KeyboardInterrupt:
        _say("interrupted", verbose)
        return INTERRUPTED
    except Exception as error:  # the one place that answers for everything
        known = explained(error)
        # Every rank of a multi-process run finds the same fault in the configuration; one says it.
        if _rank() == 0 or not isinstance(known, ConfigError):
            _say(str(known), verbose)
        return known.exit_code


def _run(line: Line) -> int:
    if line.wants == "version":
        print(f"qlora_trainer {__version__}")
        return 0
    if line.wants == "help":
        print(_usage())
        return 0
    _check_command(line.command)
    for name in LAUNCHED:
        if not os.environ.get(name, "0").isdigit():
            raise ConfigError(f"{name}={os.environ[name]!r}: the launcher's variable is no number; unset it")
    if line.multirun:
        return _sweep(line)

    from qlora_trainer.config import effect, load, preflight
    from qlora_trainer.train.signals import leaving_at_once

    if line.command == "train" and not line.keys:
        print(_usage(), file=sys.stderr)
        return ConfigError.exit_code
    with leaving_at_once() if line.command == "train" else nullcontext():
        config = load.load(line.keys, line.command, say=_note)
        preflight.check(config, line.command)
        if (idle := effect.without_effect(config, line.command)) and _rank() == 0:
            print(f"set without effect: {', '.join(idle)}", file=sys.stderr, flush=True)
        quiet_libraries()
        importlib.import_module(f"qlora_trainer.commands.{line.command}").run(config)
    return 0


def _read(argv: Sequence[str]) -> Line:
    line = Line()
    first = True
    for argument in argv:
        if argument in ("-h", "--help", "help"):
            line.wants = line.wants or "help"
        elif argument == "--version":
            line.wants = line.wants or "version"
        elif argument in ("-v", "--verbose"):
            line.verbose = True
        elif argument in ("-m", "--multirun"):
            line.multirun = True
        elif argument.startswith("-"):
            raise ConfigError(_unknown_option(argument))
        elif "=" in argument or argument.startswith(("+", "~")):
            line.keys.append(argument)
        elif first:
            line.command = argument
        else:
            raise ConfigError(
                f"{argument}: is neither key=value nor the command, which goes first; see --help"
            )
        first = first and argument.startswith("-")
    return line


def _unknown_option(argument: str) -> str:
    name = argument.lstrip("-")
    if name.startswith("experimental-rerun"):
        return (
            f"{argument}: refused: it unpickles a file, which can run any code; give recipe and keys instead"
        )
    key, _, value = name.partition("=")
    if name.split("=")[0] in ("cfg", "c", "info", "resolve", "package"):
        return f"{argument}: not offered; `recipes recipe=NAME key=value …` shows the composed configuration"
    from qlora_trainer.config import keys

    dotted = key.replace("-", "_")
    known = dotted if dotted in keys.KEYS else None
    hint = f"write {known}={value or 'VALUE'}" if known else keys.suggestion(dotted)
    return f"{argument}: unknown option; keys are written key=value without dashes: {hint}"


def _check_command(name: str) -> None:
    there = commands.available()
    if name in there:
        return
    listed = ", ".join(there)
    from qlora_trainer.config import recipes

    if name in recipes.available():
        raise ConfigError(f"{name}: is a recipe, not a command; write recipe={name}")
    near = get_close_matches(name, there, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {listed}"
    raise ConfigError(f"{name}: no such command; {hint}")


def _sweep(line: Line) -> int:
    """Each combination in a process of its own, one after another: a failed one cannot harm the next."""
    from qlora_trainer.config.load import expand_sweep

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m: a sweep cannot run inside a multi-process launch; launch each run of it by itself"
        )
    jobs = expand_sweep(line.keys, line.command)
    failed = 0  # the code of the first run that failed
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {line.command} {' '.join(job)}", flush=True)
        flags = ["-v"] if line.verbose else []
        code = subprocess.run([sys.executable, "-m", "qlora_trainer", line.command, *job, *flags]).returncode
        if code < 0:
            code = 128 - code
        if code in (
            PreemptedError.exit_code,
            INTERRUPTED,
        ):  # stopped from outside: the same line goes on from here
            return code
        failed = failed or code
    return failed


def _usage() -> str:
    from qlora_trainer.commands.recipes import listing

    there = commands.available()
    width = max(map(len, there))
    return USAGE.format(
        commands="\n".join(f"  {name:<{width}}  {text}" for name, text in there.items()), recipes=listing()
    )


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _note(text: str) -> None:
    if _rank() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def _say(text: str, verbose: bool) -> None:
    from qlora_trainer.system.terminal import printable  # it imports rich

    if verbose:
        print(indent(printable(traceback.format_exc()), "  "), end="", file=sys.stderr)
    rank = f"[rank {_rank()}] " if _rank() else ""
    # Indented, so that a name with a line break in it begins no line of the log.
    first, *more = printable(text).split("\n")
    rest = "".join(f"\n{line}" if line.startswith("  ") else f"\n  {line}" for line in more)
    print(f"{rank}error: {first}{rest}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
