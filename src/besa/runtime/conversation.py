"""A conversation: questions and answers that the model reads again with each question."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from besa.errors import BesaError, Notice
from besa.runtime.chat_template import Message, message, prompt_of
from besa.runtime.generation import Writer, Written, check_text


class Conversation:
    """A chat with a model.

    When it no longer fits into the model's positions, its oldest questions and answers are left out, one pair at a
    time, with a `Notice`; the system prompt stays. An answer has as many positions as it may have tokens, but not more
    than a quarter of all.

    Attributes:
        turns: pairs of a question and its answer that the model still reads.

    Args:
        writer: a model that chats.
        system: instructions that it begins with.
    """

    def __init__(self, writer: Writer, system: str | None = None) -> None:
        self.turns: list[tuple[str, str]] = []
        self._writer = writer
        self._beginning = [] if system is None else [message("system", system)]
        self._room = min(writer.most, writer.positions // 4)
        self._written: Written | None = None

    def ask(self, question: str, tell: Callable[[str], None]) -> str:
        """The answer to a question, which becomes part of the conversation.

        Args:
            question: of the user.
            tell: called with each word as soon as it is complete.

        Raises:
            BesaError: the question is empty, or alone longer than the model's positions; it is not kept.
            KeyboardInterrupt: Ctrl-C. The words that were told are kept as the answer.
        """
        check_text(question, "question")
        if not question.strip():
            raise BesaError("The question is empty: ask with at least one word.")
        tokens_1T = self._fitting(question)
        told: list[str] = []

        def keep(word: str) -> None:
            told.append(word)
            tell(word)

        before, self._written = self._written, None  # the cache is of no use if the answer is stopped
        try:
            self._written = self._writer.write(tokens_1T, keep, before)
        finally:
            if self._written or told:
                self.turns.append((question, self._written.text if self._written else "".join(told)))
        return self._written.text

    def _fitting(self, question: str) -> Tensor:
        """The prompt (1, T) of the conversation with a new question, without the turns that have no room."""
        turns, left_out = self.turns, 0
        tokens_1T = prompt_of(self._writer.tokenizer, self._messages(turns, question))
        while turns and tokens_1T.shape[1] > self._writer.positions - self._room:
            turns, left_out = turns[1:], left_out + 1
            tokens_1T = prompt_of(self._writer.tokenizer, self._messages(turns, question))
        if left_out and tokens_1T.shape[1] < self._writer.positions:  # else the question alone is too long
            self.turns = turns
            warnings.warn(
                f"The conversation is longer than the model's {self._writer.positions:,} positions, so its oldest "
                f"{'turn was' if left_out == 1 else f'{left_out} turns were'} left out; {len(self.turns)} remain.",
                Notice,
                stacklevel=3,
            )
        return tokens_1T

    def _messages(self, turns: list[tuple[str, str]], question: str) -> list[Message]:
        said = [part for asked, answer in turns for part in (message("user", asked), message("assistant", answer))]
        return [*self._beginning, *said, message("user", question)]
