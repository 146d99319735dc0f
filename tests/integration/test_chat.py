"""Chats: the template's tokens, answers against transformers' own, conversations, and the session in a terminal."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, MistralConfig

import besa
from besa import BesaError, cli
from besa.cli import bars, chatting, tracking
from besa.errors import Notice
from besa.runtime.conversation import Conversation
from besa.runtime.generation import Writer, open_writer

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
IGNORING = TEMPLATE.replace("messages %}", "messages if m.role != 'system' %}")
SYSTEM = "Speak of the river only."
QUESTIONS = ["Where does the city lie?", "And the river?", "Who was born there?"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template; it never ends by itself."""
    folder = tmp_path_factory.mktemp("chat") / "instruct"
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = None
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def reference(folder: Path, messages: list[dict[str, str]], tokens: int) -> str:
    """transformers' own answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def conversation(folder: Path, system: str | None = None, tokens: int = 12) -> Conversation:
    writer, chats = open_writer(
        folder, chat=None, system=system, max_new_tokens=tokens, temperature=0, seed=0, device="cpu", dtype="auto",
        trust_remote_code=False,
    )  # fmt: skip
    assert chats
    return Conversation(writer, system)


def test_an_instruct_model_answers(instruct: Path, tmp_path: Path) -> None:
    question = QUESTIONS[0]
    plain = reference(instruct, [user(question)], 20)
    words: list[str] = []
    assert besa.generate(instruct, question, max_new_tokens=20, tell=words.append) == plain
    assert "".join(words) == plain
    assert len(words) > 3
    assert besa.generate(instruct, question, max_new_tokens=20, chat=True) == plain
    guided = reference(instruct, [{"role": "system", "content": SYSTEM}, user(question)], 20)
    assert besa.generate(instruct, question, system=SYSTEM, max_new_tokens=20) == guided
    continued = besa.generate(instruct, question, max_new_tokens=20, chat=False)
    assert continued == besa.generate(TINY, question, max_new_tokens=20)  # which has no template
    assert len({plain, guided, continued}) == 3

    besa.compress(instruct, "magnitude", str(TINY / "calibration.txt"), out=tmp_path / "out", samples=1, seqlen=8)
    besa.pack(tmp_path / "out", tmp_path / "packed")
    answers = {besa.generate(tmp_path / name, question, max_new_tokens=20) for name in ("out", "packed")}
    assert answers == {reference(tmp_path / "out", [user(question)], 20)}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["a"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"cache_implementation": "offloaded"},
        {"repetition_penalty": 9.0, "guidance_scale": 1.5},
    ],
    ids=str,
)
def test_settings_of_the_checkpoint_that_are_not_asked_for(
    settings: dict[str, Any], instruct: Path, tmp_path: Path
) -> None:
    """The likeliest token each time, whatever way of its own the checkpoint would take."""
    folder = shutil.copytree(instruct, tmp_path / "model")
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | settings))
    told: list[str] = []
    found = besa.generate(folder, QUESTIONS[0], max_new_tokens=12, device="cpu", tell=told.append)
    assert found == reference(instruct, [user(QUESTIONS[0])], 12)
    assert "".join(told).strip() == found.strip()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -3),
        ("top_p", "a"),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("eos_token_id", []),
        ("eos_token_id", "x"),
    ],
)
def test_settings_that_no_token_can_be_chosen_by(name: str, value: Any, instruct: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(instruct, tmp_path / "model")
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | {name: value}))
    refused = f"The model's generation_config.json has {name} = {value!r}: correct it, or remove it."
    with pytest.raises(BesaError, match=re.escape(refused)):
        besa.generate(folder, QUESTIONS[0], max_new_tokens=2, temperature=0.7, device="cpu")


def test_tokens_are_sampled_of_all_where_the_checkpoint_does_not_say() -> None:
    """Not of the 50 likeliest, which is what transformers takes for a setting that nobody gave."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    prompt_1T = torch.tensor([[1, 2, 3]])
    likeliest = set(model(prompt_1T).logits[0, -1].topk(50).indices.tolist())
    for most, outside in ((None, True), (50, False)):
        model.generation_config.top_k = most
        writers = [Writer(model, tokenizer, 1, temperature=1e4, seed=seed) for seed in range(8)]
        drawn = {int(writer.write(prompt_1T).tokens_1T[0, -1]) for writer in writers}
        assert bool(drawn - likeliest) == outside


@pytest.mark.slow
def test_default_lengths(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    for chat, tokens in ((True, 1024), (False, 128)):
        model = AutoModelForCausalLM.from_pretrained(instruct, max_position_embeddings=2048)
        steps: list[int] = []
        model.get_input_embeddings().register_forward_hook(lambda *_, steps=steps: steps.append(1))
        besa.generate(model, "The", chat=chat, tokenizer=tokenizer)
        assert len(steps) == tokens


def test_a_conversation_is_read_again_but_not_computed_again(instruct: Path) -> None:
    chat, messages = conversation(instruct, SYSTEM), [{"role": "system", "content": SYSTEM}]
    computed: list[int] = []
    embeddings = chat._writer._model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape[1]))
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    for turn, question in enumerate(QUESTIONS):
        messages.append(user(question))
        computed.clear()
        answer = chat.ask(question, lambda word: None)
        assert answer == reference(instruct, messages, 12)
        prompt = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        assert computed[0] == prompt if turn == 0 else computed[0] < prompt // 2
        assert sum(computed[1:]) == 11
        messages.append({"role": "assistant", "content": answer})
    assert chat.turns == list(zip(QUESTIONS, (m["content"] for m in messages[2::2]), strict=True))


def test_a_cache_that_cannot_be_shortened_is_left(instruct: Path) -> None:
    """Sliding windows forget what a shorter beginning needs; learned positions are as good as rotary ones."""
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    sizes = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            sliding_window=8, max_position_embeddings=256, initializer_range=0.5, **sizes,
        )
    )  # fmt: skip
    learned = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5, **sizes)
    )
    for model, reused in ((sliding, False), (learned, True)):
        model.generation_config.pad_token_id = 0
        writer = Writer(model.eval(), tokenizer, 10, 0.0, 0)
        chat = Conversation(writer)
        for question in QUESTIONS:
            tokens_1T = chat._fitting(question)
            assert chat.ask(question, lambda word: None) == writer.write(tokens_1T).text
            assert (chat._written.cache is not None) is reused


def test_a_stopped_answer_is_kept_as_far_as_it_was_told(instruct: Path) -> None:
    chat, told = conversation(instruct, tokens=40), []

    def stop(word: str) -> None:
        told.append(word)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTIONS[0], stop)
    assert chat.turns == [(QUESTIONS[0], "".join(told))]
    messages = [user(QUESTIONS[0]), {"role": "assistant", "content": "".join(told)}, user(QUESTIONS[1])]
    assert chat.ask(QUESTIONS[1], lambda word: None) == reference(instruct, messages, 40)


def test_a_long_conversation_loses_its_oldest_turns(instruct: Path) -> None:
    chat = conversation(instruct, SYSTEM, tokens=60)
    with pytest.warns(Notice) as notices:
        for number in range(8):
            chat.ask(f"{QUESTIONS[number % 3]} {number}", lambda word: None)
    assert "longer than the model's 512 positions, so its oldest turn was left out; " in str(notices[0].message)
    assert len(notices) == 8 - len(chat.turns)
    kept = [int(question[-1]) for question, _ in chat.turns]
    assert kept == list(range(8 - len(kept), 8))
    assert len(kept) > 2
    last = [{"role": "system", "content": SYSTEM}]
    for question, answer in chat.turns[:-1]:
        last += [user(question), {"role": "assistant", "content": answer}]
    assert chat.turns[-1][1] == reference(instruct, [*last, user(chat.turns[-1][0])], 60)
    before = list(chat.turns)
    with pytest.raises(BesaError, match="so the model has no position left"):
        chat.ask("a b " * 600, lambda word: None)
    assert chat.turns == before  # a question that has no room even alone costs no turn
    with pytest.raises(BesaError, match="The question is empty"):
        chat.ask("  ", lambda word: None)


@pytest.mark.parametrize(
    ("template", "how", "sentence"),
    [
        (None, {"chat": True}, "The tokenizer has no chat template"),
        (None, {"system": SYSTEM}, "the tokenizer has no chat template: put it in the prompt"),
        (TEMPLATE, {"system": SYSTEM, "chat": False}, "A system prompt belongs to a chat"),
        (REFUSING, {"system": SYSTEM}, "takes no system prompt: put it at the beginning of your question"),
        (IGNORING, {"system": SYSTEM}, "takes no system prompt: put it at the beginning of your question"),
        (TEMPLATE, {"prompt": " \n"}, "The prompt is empty"),
        ("{{ nothing.at.all }}", {}, r"The model's chat template fails \('nothing' is undefined\)"),
        ("{% if", {}, r"The model's chat template fails \("),
        ("{{ messages + 1 }}", {}, r"The model's chat template fails \("),
        (TEMPLATE, {"prompt": "a b " * 600}, "no position left"),
    ],
)
def test_what_cannot_be_answered_is_refused(instruct, tiny_llama, template, how, sentence) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = template
    with pytest.raises(BesaError, match=sentence) as caught:
        besa.generate(tiny_llama, **({"prompt": "The"} | how), tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["besa", "generate", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def test_questions_can_be_piped_in(instruct, tmp_path, monkeypatch, capsys) -> None:
    lines = tmp_path / "lines.txt"
    arguments = (instruct, "--system", SYSTEM, "--max-new-tokens", 12)
    lines.write_text(f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\r\n/exit\n{QUESTIONS[2]}\n")
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(monkeypatch, *arguments) == 0
    chat = conversation(instruct, SYSTEM)
    expected = [chat.ask(question, lambda word: None) for question in QUESTIONS[:2]]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
    assert run(monkeypatch, *arguments, "--prompt", QUESTIONS[0]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"
    for content, sentence in ((b"\n", "There is nothing to answer"), (b"\xff\n", "Standard input is no UTF-8")):
        lines.write_bytes(content)
        with lines.open(encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert run(monkeypatch, *arguments) == 2
        assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_a_model_without_a_chat_needs_a_prompt(monkeypatch, capsys) -> None:
    for arguments, sentence in (([], "it continues texts"), (["--no-chat"], "give it with --prompt")):
        assert run(monkeypatch, TINY, *arguments) == 2
        assert sentence in capsys.readouterr().err.replace("\n", " ")


class Screen(io.StringIO):
    """A standard stream that is a terminal, or a pipe."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_an_answer_is_on_standard_output_whatever_is_drawn_before_it(instruct, monkeypatch, terminal) -> None:
    """A bar of rich would take what is printed to standard error, each word on a line of its own."""
    shown, printed = Screen(True), Screen(terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "stdout", printed)
    for module in (tracking, bars):
        monkeypatch.setattr(module, "err", Console(file=shown, force_terminal=True))
    assert run(monkeypatch, instruct, "--prompt", QUESTIONS[0], "--max-new-tokens", 12) == 0
    answer = conversation(instruct).ask(QUESTIONS[0], lambda word: None)
    assert len(answer.split()) > 3
    assert printed.getvalue() == f"{answer}\n"
    assert not set(answer.split()) & set(shown.getvalue().split())


def test_control_characters_of_an_answer_are_shown_to_a_terminal_not_obeyed(monkeypatch) -> None:
    kept, controls = "café \N{ZERO WIDTH JOINER}\ta\n", "\x1b]52;c;bWU=\x07\x9b2J\x00\x7f\r"
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stdout", Screen(terminal))
        for character in kept + controls:
            chatting.say(character)
        written = r"\x1b]52;c;bWU=\x07\x9b2J\x00\x7f\r" if terminal else controls
        assert sys.stdout.getvalue() == kept + written


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process, self._mine = pty.fork()
        if self.process == 0:
            os.execv(sys.executable, [sys.executable, "-m", "besa", *map(str, arguments)])
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def until(self, text: str, again: str = "") -> str:
        """What is shown up to and with a text; keys are typed `again` each second, as Python can lose a Ctrl-C."""
        end = time.monotonic() + 120
        while text not in self._shown:
            assert time.monotonic() < end, self._shown
            if select.select([self._mine], [], [], 1)[0]:
                self._shown += os.read(self._mine, 4096).decode()
            else:
                self.type(again)
        before, _, self._shown = self._shown.partition(text)
        return before + text

    def ends(self) -> int:
        """Its exit code, when it has ended by itself."""
        process, self.process = self.process, 0
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def close(self) -> None:
        os.close(self._mine)
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)


def test_a_chat_in_a_terminal(instruct: Path) -> None:
    terminal = Terminal("generate", instruct)
    try:
        assert "Ctrl-C stops an answer; /exit or Ctrl-D ends the chat." in terminal.until("> ")
        terminal.type(f"{QUESTIONS[0]}\r")
        terminal.until(f"{QUESTIONS[0]}\r\n")
        shown = terminal.until(" ")
        terminal.type("\x03")
        shown += terminal.until("> ").removesuffix("> ").replace("^C", "")
        whole = reference(instruct, [user(QUESTIONS[0])], 400)
        shown = shown.replace("\r\n", "\n").rstrip("\n")
        assert whole.startswith(shown.rstrip())
        assert 0 < len(shown) < len(whole)
        terminal.type("a b " * 300 + "\r")
        terminal.until("no position left: shorten it.")
        terminal.until("> ")
        terminal.type("\x03")
        terminal.until("/exit or Ctrl-D ends the chat.", again="\x03")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ends() == 0
    finally:
        terminal.close()
