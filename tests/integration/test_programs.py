"""Programs that people run, on a packed checkpoint: lm_eval, transformers' server with OpenAI's client, its chat."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import lm_eval.tasks
import pytest
from openai import OpenAI

import besa
from besa.data import questions as embedded
from tests.tiny_questions import rows, write

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
BIN = Path(sys.executable).parent
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}answer:"
PROMPT, QUESTION = "The city lies on the river", "What stands near the river?"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with a chat template."""
    folder = tmp_path_factory.mktemp("programs")
    shutil.copytree(TINY, folder / "tiny")
    (folder / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    besa.compress(folder / "tiny", "wanda", str(TINY / "calibration.txt"), out=folder / "dense", samples=2, seqlen=16)
    besa.pack(folder / "dense", folder / "packed")
    return folder / "packed"


@pytest.mark.slow
def test_lm_eval_finds_the_scores_of_besa_eval(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "fetch", lambda name, progress: write(name.removeprefix("zero-shot-"), tmp_path))
    ours = besa.evaluate(packed, tasks=["arc_easy"]).zero_shot
    assert ours is not None
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows("arc_easy")))
    definition = Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"
    splits = {"training_split": None, "validation_split": None}
    task = {"task": "local", "dataset_path": "json", "dataset_name": None, "include": str(definition), **splits}
    task["dataset_kwargs"] = {"data_files": {"test": str(questions)}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))  # JSON is YAML
    command = f"--model hf --model_args pretrained={packed} --tasks local --include_path {tmp_path / 'tasks'}"
    out = tmp_path / "scores.json"
    made = subprocess.run(
        [BIN / "lm_eval", *command.split(), "--device", "cpu", "--batch_size", "16", "--output_path", out],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        timeout=900,
    )
    assert made.returncode == 0, made.stderr
    [scores] = (json.loads(path.read_text())["results"]["local"] for path in tmp_path.rglob("scores_*.json"))
    found = ours.tasks["arc_easy"]
    assert (found.acc, found.acc_norm) == (scores["acc,none"], scores["acc_norm,none"])
    assert found.acc_stderr == scores["acc_stderr,none"]


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve`, which holds the packed model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [BIN / "transformers", "serve", packed, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        serving = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            try:
                urlopen(f"{address}/health")
                break
            except URLError:
                assert serving.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        serving.terminate()
        serving.wait(timeout=600)


@pytest.mark.slow
def test_a_client_of_openai_streams_chats_and_completions(packed: Path, server: str) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    settings = {"model": str(packed), "max_tokens": 12, "temperature": 0}
    conversation = [{"role": "user", "content": QUESTION}]
    parts = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(messages=conversation, stream=True, **settings)
        if part.choices
    ]
    assert len(parts) > 2
    assert "".join(parts).strip() == besa.generate(packed, QUESTION, max_new_tokens=12).strip()
    parts = [
        part.choices[0].text
        for part in client.completions.create(prompt=PROMPT, stream=True, **settings)
        if part.choices
    ]
    assert len(parts) > 2
    assert "".join(parts).strip() == besa.generate(packed, PROMPT, chat=False, max_new_tokens=12).strip()


@pytest.mark.slow
def test_transformers_chat_talks_to_it(packed: Path, server: str, tmp_path: Path) -> None:
    made = subprocess.run(
        [BIN / "transformers", "chat", packed, server, "max_new_tokens=12", "do_sample=False"],
        input=f"{QUESTION}\nn\n!exit\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=900,
    )
    expected = besa.generate(packed, QUESTION, max_new_tokens=12)
    assert " ".join(expected.split()) in " ".join(made.stdout.split()), made.stdout + made.stderr
