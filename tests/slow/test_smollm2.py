"""The real SmolLM2-135M, at sizes that take minutes: the demo's claim, checked."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa.data.calibration import read_documents
from besa.studies import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    return demo.run_demo(tmp_path_factory.mktemp("smollm2") / "demo", demo.QUICK, 0.5, ["wiki"])


def perplexity(made: demo.Demo, method: str) -> float:
    rows = {row.recipe: row for row in (made.comparison.dense, *made.comparison.rows)}
    return rows[method].mean["wiki"]


def test_besa_beats_wanda(made: demo.Demo) -> None:
    assert perplexity(made, "dense") < perplexity(made, "besa") < 0.92 * perplexity(made, "wanda")


@pytest.mark.parametrize("method", ["wanda", "besa"])
def test_half_of_the_written_weights_are_zero_exactly(made: demo.Demo, method: str) -> None:
    tensors = load_file(made.checkpoints[method] / "model.safetensors")
    prunable = [tensor for name, tensor in tensors.items() if "_proj.weight" in name]
    assert len(prunable) == 30 * 7
    assert 2 * sum(int((tensor == 0).sum()) for tensor in prunable) == sum(tensor.numel() for tensor in prunable)


def test_reported_perplexity_is_a_hand_written_loop_over_the_plain_checkpoint(made: demo.Demo) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.checkpoints["besa"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoints["besa"])
    tokens = tokenizer("\n\n".join(read_documents("wiki")), add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, 20 * 512, 512):
        window = torch.tensor([tokens[start : start + 512]])
        with torch.no_grad():
            predictions = model(window).logits[0, :-1].double().log_softmax(-1)
        total -= float(predictions.gather(1, window[0, 1:, None]).sum())
    mean = torch.tensor(total / (20 * 511), dtype=torch.float64)
    assert float(mean.exp()) == pytest.approx(perplexity(made, "besa"), rel=1e-4)


def test_the_embedded_questions_are_all_there() -> None:
    from besa.data.questions import TASKS, questions

    counts = {
        "piqa": 1838,
        "boolq": 3270,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc_easy": 2376,
        "arc_challenge": 1172,
    }
    assert {task: len(questions(task)) for task in TASKS} == counts
    first = questions("boolq")[0]  # as SuperGLUE has it, with a title
    assert first["passage"].startswith("Ethanol fuel -- All biomass goes through")
    assert (first["question"], first["label"]) == ("does ethanol take more energy make that produces", 0)
    assert sum(row["label"] for row in questions("boolq")) == 2033
