"""Which chat template applies: the recipe's, the tokenizer's own, or one that comes with the package.

Comes in: `data.template` and a tokenizer. Goes out: Jinja text with its origin, or a `ChatTemplate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.errors import ConfigError, MissingInputError


def named_templates() -> dict[str, str]:
    """The templates that come with the package: name -> Jinja text."""
    folder = resources.files("qlora_trainer.data") / "chat_templates"
    return {
        item.name.removesuffix(".jinja"): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".jinja")
    }


def template_source(template: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """(Jinja text, origin) of what the recipe or the tokenizer names; None if neither has one.

    Raises MissingInputError for a file that is not there, ConfigError for an unknown name.
    """
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return (own, "the tokenizer's own") if own else None
    named = named_templates()
    if template in named:
        return named[template], f"named {template}"
    path = Path(template).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), f"file {path}"
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.template={template}: not UTF-8 text (byte {error.start})") from error
    if path.suffix or "/" in template:
        raise MissingInputError(
            f"data.template={template}: no such file; give a Jinja file or one of {' '.join(named)}"
        )
    raise ConfigError(
        f"data.template={template}: unknown name; known: {' '.join(named)}, or give a Jinja file"
    )


def resolve_template(
    template: str | None, tokenizer: PreTrainedTokenizerBase, formats: Sequence[str]
) -> ChatTemplate:
    """The template to use for conversations.

    The recipe's, else the tokenizer's own, else (a base model) the Alpaca prompt of the paper if all
    sources are alpaca, and `### Human: / ### Assistant:` (guanaco) otherwise.
    """
    found = template_source(template, tokenizer)
    if found is None:
        name = "alpaca" if set(formats) == {"alpaca"} else "guanaco"
        found = named_templates()[name], f"default for a base model: {name}"
    chat = ChatTemplate(*found, tokenizer)
    if template in named_templates() and chat.end_of_turn is None:
        raise ConfigError(
            f"data.template={template}: this tokenizer has not the token that ends its turns; "
            "use data.template=alpaca or guanaco, which end them with EOS"
        )
    return chat
