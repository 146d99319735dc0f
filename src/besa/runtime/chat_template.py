"""The chat template of a tokenizer: how messages become the tokens that an instruct model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from besa.errors import BesaError

Message = dict[str, str]
DATE = datetime(2024, 7, 26)  # the day in calibration texts; the templates of Llama 3 have it where they know no other


def message(role: str, content: str) -> Message:
    """A message as templates expect it.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: its text.
    """
    return {"role": role, "content": content}


def check_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None, system: str | None) -> bool:
    """Whether to chat: as asked; by default, if the tokenizer has a chat template.

    Raises:
        BesaError: a chat or a system prompt is wanted, but the tokenizer has no template, or one that takes no system
            prompt.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
        if not chat and system is not None:
            raise BesaError(
                "A system prompt needs a chat, and the tokenizer has no chat template: put it in the prompt."
            )
    if not chat:
        if system is not None:
            raise BesaError("A system prompt belongs to a chat: leave it out, or put it in the text to continue.")
        return False
    if not tokenizer.chat_template:
        raise BesaError(
            "The tokenizer has no chat template, so the model is not made for chats: continue a text (--no-chat)."
        )
    if system is not None:
        _check_system(tokenizer, system)
    return True


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], today: datetime | None = None) -> Tensor:
    """Token ids (1, T) of messages, followed by the beginning of an answer.

    Args:
        tokenizer: with a template.
        messages: the latest last.
        today: for templates that name the day; the present one by default.

    Raises:
        BesaError: the template refuses the messages, or is damaged.
    """
    return _applied(tokenizer, messages, tokenize=True, today=today)["input_ids"]  # type: ignore[index, no-any-return]


def dialogue_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], str]:
    """A function that renders a user's message and an answer as text, the same on every day.

    Raises:
        BesaError: the tokenizer has no chat template, or one that fails; the function raises it too.
    """
    if not tokenizer.chat_template:
        raise BesaError(
            "--chat: the tokenizer has no chat template, so the model is not made for chats: calibrate on plain text."
        )

    def render(user: str, answer: str) -> str:
        messages = [message("user", user), message("assistant", answer)]
        instead = "calibrate on plain text, without --chat"
        return str(_applied(tokenizer, messages, answered=True, instead=instead, today=DATE))

    render("?", "!")
    return render


def _check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Refuse a system prompt that would not reach the model.

    Raises:
        BesaError: the template refuses system prompts, or leaves them out.
    """
    question = message("user", "?")
    without = _applied(tokenizer, [question])
    try:
        reached = _rendered(tokenizer, [message("system", system), question]) != without
    except FAILURES:
        reached = False
    if not reached and system.strip():
        raise BesaError("The model's chat template takes no system prompt: put it at the beginning of your question.")


# What a template raises: by itself (`raise_exception`, a word it does not know), or by what Python says to its values.
FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tokenize: bool = False,
    answered: bool = False,
    instead: str = "continue a text (--no-chat)",
    today: datetime | None = None,
) -> object:
    """See `_rendered`; `instead` is what a user can do where the template fails.

    Raises:
        BesaError: the template refuses the messages, or is damaged.
    """
    try:
        return _rendered(tokenizer, messages, tokenize, answered, today)
    except FAILURES as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise BesaError(
            f"The model's chat template fails ({reason[:300] or type(error).__name__}): {instead}."
        ) from error


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tokenize: bool = False,
    answered: bool = False,
    today: datetime | None = None,
) -> object:
    """Messages in the template, as text or, `tokenize`, as the tokenizer's tensors.

    The beginning of an answer follows, unless the messages have been `answered`.
    """
    how: dict[str, Any] = {"return_tensors": "pt", "return_dict": True} if tokenize else {}
    if today is not None:
        how["strftime_now"] = today.strftime  # in place of transformers' own, which looks at the clock
    rendered: object = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=not answered, tokenize=tokenize, **how
    )
    return rendered
