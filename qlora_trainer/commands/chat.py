"""Talk to a finished run in the terminal, or through a pipe: one line in, one streamed answer out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import TextIOWrapper

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.inference.chat import Chat, ChatOptions
from qlora_trainer.inference.generate import Sampling
from qlora_trainer.inference.load import load
from qlora_trainer.jobs.wiring import run_folder
from qlora_trainer.system.terminal import printable


def run(config: RunConfig) -> None:
    """Answers until /quit or the end of input; prompts and hints only where a person types."""
    wanted = config.chat
    model = config.model
    loaded = load(
        run_folder(config),
        base=model.model_name_or_path,
        device=model.device,
        cache_quantized=model.cache_quantized,
        revision=model.revision,
    )
    sampling = Sampling(
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        seed=config.seed,
    )
    talk = Chat(loaded, ChatOptions(sampling, wanted.system), _write)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text in its encoding ends no conversation
    if sys.stdin.isatty():
        print("/reset starts over, /quit leaves, Ctrl-C stops an answer")
    talk.run(_typed() if sys.stdin.isatty() else sys.stdin)


def _write(text: str) -> None:
    sys.stdout.write(printable(text))  # a model may have learned to speak to terminals
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D, or Ctrl-C at the prompt."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            return
