"""The command line on the tiny Llama: what it writes, and how it refuses."""

import json
import re
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa.api import compressing
from tests.calling import called
from tests.slowly import some_slow

TINY = Path(__file__).parent.parent / "assets" / "tiny-llama"
MIXTURE = TINY.with_name("tiny-mixture")
SMALL = ["--calibration", str(TINY / "calibration.txt"), "--samples", "8", "--seqlen", "64"]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one sentence after the lines on blocks that were done, no traceback."""
    *before, message = result.stderr.strip().splitlines()
    assert result.returncode == 2, message
    assert all(re.match(r"besa: [\d-]+ [\d:]+ block \d/8, ", line) for line in before), before
    assert message.startswith("besa: ")
    assert message.endswith(".")
    assert "Traceback" not in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    result = called("prune", TINY, out, "--recipe", "besa", "--sparsity", "0.6", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "(60.0000%)" in result.stdout
    return out


def test_prune_writes_exactly_the_zeros_asked_for(pruned: Path) -> None:
    tensors = load_file(pruned / "model.safetensors")
    prunable = [tensor for name, tensor in tensors.items() if "_proj.weight" in name]
    weights = sum(tensor.numel() for tensor in prunable)
    assert len(prunable) == 8 * 7
    assert sum(int((tensor == 0).sum()) for tensor in prunable) == round(0.6 * weights)


def test_prune_leaves_everything_else_as_it_was(pruned: Path) -> None:
    before, after = load_file(TINY / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kept = after[name] != 0 if "_proj.weight" in name else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], after[name][kept])


def test_checkpoint_loads_with_transformers_alone(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    tokens = tokenizer("The city lies on the river", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 3
    assert model.config.besa["recipe"] == "besa"
    (plain := pruned.parent / "plain").touch()
    assert (pruned / "model.safetensors").stat().st_mode == plain.stat().st_mode  # not private like temporary files


def test_run_record_tells_what_was_counted(pruned: Path) -> None:
    record = json.loads((pruned / "besa_run.json").read_text())
    tensors = load_file(pruned / "model.safetensors")
    assert record["zeros"] == round(0.6 * record["weights"])
    assert record["seed"] == 0
    assert record["restored_blocks"] == 0
    assert all(linear["reached"] for block in record["blocks"] for linear in block["linears"])
    assert record["recipe"]["sparsity"] == 0.6
    assert record["calibration"]["samples"] == 8
    assert len(record["calibration"]["sha256"]) == 64
    assert record["peak_memory_bytes"] > 1e8
    allocation = record["recipe"]["allocation"]
    assert (allocation["crop"], allocation["steps"], allocation["travel"]) == (1, 44, 6)  # of so few sequences
    steps = [len(block["losses"]) for block in record["blocks"]]
    assert all(taken == 44 or (taken % 8 == 0 and 0 < taken < 44) for taken in steps), steps  # all, or whole passes
    for block in record["blocks"]:
        assert block["zeros"] == sum(linear["zeros"] for linear in block["linears"])
        assert 0 < block["reconstruction_error"] < 1
        for linear in block["linears"]:
            tensor = tensors[f"{linear['name']}.weight"]
            assert linear["zeros"] == int((tensor == 0).sum())
            assert linear["shape"] == list(tensor.shape)
            assert sum(linear["row_rates"]) == tensor.shape[0]


def test_repeated_run_is_bit_equal(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert called("prune", TINY, out, "--recipe", "besa", "--sparsity", "0.6", *SMALL).returncode == 0
    assert (out / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_inspect_counts_in_the_files(pruned: Path, tmp_path: Path) -> None:
    # A checkpoint that says one thing in its record and another in its tensors is told by its tensors.
    copy = shutil.copytree(pruned, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.3.mlp.up_proj"
    tensors[f"{name}.weight"] = torch.zeros_like(tensors[f"{name}.weight"])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    result = called("inspect", copy, "--json", tmp_path / "inspect.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "inspect.json").read_text())
    linears = {linear["name"]: linear for linear in found["linears"]}
    size = {"bytes": 98304, "parts": {"values": 98304}}
    assert linears[name] == {"name": name, "shape": [256, 96], "zeros": 24576, "sparsity": 1.0, **size}
    assert found["bits_per_weight"] == 32
    assert found["zeros"] == sum(linear["zeros"] for linear in linears.values())
    assert found["sparsity"] == found["zeros"] / found["weights"]
    assert "100.00" in result.stdout


def test_eval_writes_perplexities_by_name_and_stem(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "eval.json"
    result = called(
        "eval", pruned, "--ppl", TINY / "heldout.txt", "--ppl", TINY / "calibration.txt", "--window", "128",
        "--max-windows", "20", "--json", file,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    measured = json.loads(file.read_text())
    assert measured["perplexity"].keys() == {"heldout", "calibration"}
    assert 20 < measured["perplexity"]["heldout"] < 100
    assert measured["details"]["heldout"]["predicted"] == 20 * 127
    assert measured["sparsity"] == pytest.approx(0.6, abs=1e-5)
    assert f"{measured['perplexity']['heldout']:.3f}" in result.stdout


def test_eval_of_test_sets_in_several_windows(tmp_path: Path) -> None:
    (tmp_path / "ptb.txt").write_text(" the city <unk> on the river \n" * 40)
    (tmp_path / "c4.jsonl").write_text('{"text": "The city lies on the river, and the bridge is old."}\n' * 40)
    data = [f"--data=ptb={tmp_path / 'ptb.txt'}", f"--data=c4={tmp_path / 'c4.jsonl'}"]
    file = tmp_path / "eval.json"
    result = called("eval", TINY, "--ppl", "ptb", "--ppl", "c4", *data, "--window", "64,32", "--json", file)
    assert result.returncode == 0, result.stderr
    measured = json.loads(file.read_text())
    assert measured["window"] == 64
    assert measured["sources"] == {"ptb": "ptb.txt", "c4": "c4.jsonl"}
    assert measured["perplexity"].keys() == measured["other_windows"]["32"].keys() == {"ptb", "c4"}
    assert measured["details"]["c4"]["windows"] == measured["other_windows"]["32"]["c4"]["windows"] // 2
    assert measured["zero_shot"] is None
    assert 0 < measured["details"]["c4"]["bits_per_byte"] < 8
    for arguments, words in (
        (["--ppl", tmp_path / "c4.jsonl"], ["--data c4="]),
        (["--ppl", "ptb", "--data", "ptb"], ["--data ptb", "NAME=FILE"]),
        (["--ppl", "ptb", "--data", "ptb=a", "--data", "ptb=b"], ["--data ptb is given twice: give it once"]),
        (["--ppl", "wiki", "--window", "512,many"], ["--window 512,many"]),
        (["--ppl", "wiki", "--window", ","], ["window", "2048"]),
        (["--tasks", "piqa,mmlu"], ["mmlu", "winogrande"]),
    ):
        assert_refused(called("eval", TINY, *arguments), *words)


def test_report_is_one_page(pruned: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert called("report", pruned, "--out", page).returncode == 0
    assert "60.00" in page.read_text()
    assert_refused(called("report", tmp_path, "--out", page), str(tmp_path))
    same = pruned / ".." / pruned.name
    assert_refused(called("report", pruned, same, "--out", page), f"{same} is named twice: name each run once.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nonsense"], ["nonsense", "besa-layerwise"]),
        (["--set", "allocation.epoch=2"], ["allocation", "epoch"]),
        (["--set", "allocation.steps=many"], ["allocation", "steps"]),
        (["--sparsity", "1.0"], ["sparsity"]),
        (["--sparsity", "-0.1"], ["sparsity"]),
        (["--calibration", "missing.txt"], ["missing.txt"]),
        (["--samples", "5000", "--seqlen", "512"], ["tokens", "2,560,000"]),
        (["--device", "cuda"], ["CUDA"]),
        (["--device", "tpu"], ["tpu", "auto, cpu, cuda, cuda:N, mps or xpu"]),
        (["--device", "cpu:1"], ["cpu:1"]),
        (["--skip", "*.nothing"], ["skip", "*.nothing", "besa inspect"]),
        (["--skip", "*"], ["nothing to prune"]),
        (["--sparsity-of", "*.k_proj"], ["--sparsity-of *.k_proj:", "pattern=sparsity"]),
        (["--sparsity-of", "*.none=0.3"], ["sparsity_of", "*.none"]),
        (["--set", "sparsity=0.4", "--set", " sparsity =0.3"], ["--set sparsity is given twice: give it once"]),
        (["--sparsity", "0.5", "--set", "sparsity=0.3"], ["--sparsity and --set sparsity decide the same"]),
        (["--recipe", "best", "--passes", "40", "--set", "distill.epochs=1"], ["--passes and --set distill.epochs"]),
        (["--recipe", "best", "--minutes", "5", "--set", "distill.minutes=7"], ["--minutes and --set distill.minutes"]),
        (["--recipe", "wanda", "--dequantized"], ["--dequantized is not used"]),
        (["--recipe", "depth", "--skip", "*.layers.0.*"], ["All of model.layers.0 is skipped", "q_proj"]),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert_refused(called("prune", TINY, tmp_path / "out", *SMALL, *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = shutil.copytree(TINY, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    damaged = shutil.copytree(TINY, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:100_000])
    assert_refused(called("prune", empty, out, *SMALL), "config.json")
    assert_refused(called("prune", pickled, out, *SMALL), "safetensors")
    assert_refused(called("prune", damaged, out, *SMALL), "damaged")
    assert_refused(called("prune", tmp_path / "none.gguf", out, *SMALL), "none.gguf")
    assert_refused(called("prune", tmp_path / "nowhere", out, *SMALL), "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty", "pickled"]


def test_a_damaged_configuration_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert_refused(called("plan", tmp_path), "is not a valid JSON file: mend it, or get the model anew.")


def test_existing_out_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert_refused(called("prune", TINY, tmp_path / "out", *SMALL), "exists")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_nan_in_activations_is_refused(tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(called("prune", model, tmp_path / "out", *SMALL), "model.layers.2", "NaN")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # before any block was pruned


def test_infinity_in_activations_is_refused(tmp_path: Path) -> None:
    """Weights that are finite, and outputs that are not: the block is named, and those before it are kept."""
    model = shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(called("prune", model, tmp_path / "out", *SMALL), "The output of model.layers.2 has NaN or infinity")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.partial"]


def with_file_quota(kilobytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A quota on file size is the full disk that a test can make: the write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, hard))  # Python ignores the signal that goes with it
    try:
        return called(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    assert_refused(with_file_quota(100, "prune", TINY, tmp_path / "out", *SMALL), "out")  # a block has 400 KB
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_full_disk_at_the_end_keeps_the_blocks(pruned: Path, tmp_path: Path) -> None:
    arguments = ["prune", TINY, tmp_path / "out", "--recipe", "besa", "--sparsity", "0.6", *SMALL]
    assert_refused(with_file_quota(1000, *arguments), "out")  # the checkpoint has 4 MB
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert_refused(called(*arguments), "8 finished blocks", "--resume")
    resumed = called(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_short_text_for_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    assert_refused(called("eval", TINY, "--ppl", tmp_path / "short.txt", "--window", "128"), "128")


def test_usage_errors_leave_with_2() -> None:
    assert_refused(called("prune"), "MODEL", "besa prune --help")
    assert_refused(called("prune", TINY, "out", "--sparsity", "half"), "--sparsity", "number")
    assert_refused(called("unknown"), "unknown")
    assert_refused(called("prune", TINY, "out", "--dtype", "float64"), "value for '--dtype': 'float64' is not one of")
    empty = "--tokens is empty: give a number, or several separated by commas."
    assert_refused(called("simulate", TINY, "--tokens", ""), empty)
    assert_refused(called("simulate", TINY, "--tokens", "8,0"), "--tokens 8,0: give whole numbers from 1.")
    assert_refused(called("eval", TINY), "--ppl")
    assert_refused(called("prune", TINY, "out", "--recipe"), "--recipe", "argument")
    assert_refused(called("verify", TINY, "--quiet=1"), "--quiet", "besa")
    text = ["--ppl", TINY / "heldout.txt"]
    assert_refused(called("eval", TINY, *text, "--limit", "3"), "--limit is not used: add --tasks, or leave it out.")
    assert_refused(called("eval", TINY, "--tasks", "boolq", "--window", "64"), "--window is not used: add --ppl")
    assert_refused(called("compare", TINY, "--recipes", "wanda", "--hub"), "--hub is not used: add --tasks")
    for given in (["--seed", "0"], ["--seed", "3", "--temperature", "0"]):
        refused = called("generate", TINY, "--prompt", "The city", *given)
        assert_refused(refused, "--seed is not used: add a --temperature above 0, or leave it out.")
    none = called("compare", TINY, "--recipes", "wanda", "--tasks", ",", "--limit", "3")  # such as of an empty variable
    assert_refused(none, "--limit is not used: add --tasks")


@pytest.mark.parametrize("name", ["besa_run.json", "config.json", "model.safetensors"])
def test_results_do_not_replace_files_of_a_checkpoint(name: str, pruned: Path) -> None:
    before = (pruned / name).read_bytes()
    assert_refused(called("inspect", pruned, "--json", pruned / name), name, "choose another name")
    assert_refused(called("report", pruned, "--out", pruned / name), name, "choose another name")
    assert (pruned / name).read_bytes() == before


@pytest.mark.parametrize("name", ["vocab.json", "special_tokens_map.json", "merges.txt", "compare.json", "compare.md"])
def test_results_do_not_have_names_of_files_of_models_and_comparisons(name: str, tmp_path: Path) -> None:
    assert_refused(called("recipes", "--json", tmp_path / name), name, "choose another name")
    assert not (tmp_path / name).exists()


def test_results_do_not_replace_what_a_record_lists(tmp_path: Path) -> None:
    record = {"files": {"odd.json": "0" * 64}}
    (tmp_path / "besa_run.json").write_text(json.dumps(record))
    refused = called("recipes", "--json", tmp_path / "odd.json")
    assert_refused(refused, "odd.json is a file of the checkpoint in its folder", "choose another name")
    for damaged in ("[]", "{", '{"files": 3}'):
        (tmp_path / "besa_run.json").write_text(damaged)
        assert called("recipes", "--json", tmp_path / "odd.json").returncode == 0


@pytest.mark.parametrize("beside", ["config.json", "besa_run.json"])
def test_results_do_not_replace_the_card_of_a_checkpoint(beside: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert called("recipes", "--json", card).returncode == 0  # beside no checkpoint, it is a name as any other
    card.write_text("---\nlicense: mit\n---\n")
    (tmp_path / beside).write_text("{}")
    for command in (
        ["recipes", "--json"],
        ["inspect", TINY, "--json-progress"],
        ["report", tmp_path, "--out"],
    ):
        refused = called(*command, card)
        assert_refused(refused, "README.md is a file of the checkpoint in its folder", "choose another name")
    assert card.read_text() == "---\nlicense: mit\n---\n"


def test_results_beside_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(called("prune", TINY, out, *SMALL, "--json", out), "--json", "is the folder that will be written")
    same = ["--json", tmp_path / "x", "--json-progress", tmp_path / "x"]
    assert_refused(called("inspect", TINY, *same), "--json and --json-progress are both", "choose two names")
    assert_refused(called("inspect", TINY, *same[2:], *same[:2]), "--json and --json-progress are both")
    assert_refused(called("prune", TINY, out, *SMALL, *same), "choose two names")
    for command in (["prune", TINY, out, *SMALL], ["pack", TINY, out], ["unpack", TINY, out], ["shrink", TINY, out]):
        assert_refused(called(*command, "--json-progress", out / "progress.jsonl"), "lies in", "choose another place")
    assert list(tmp_path.iterdir()) == []


def test_the_result_of_pruning_is_the_record(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "result.json"
    assert called("prune", TINY, out, "--recipe", "magnitude", *SMALL, "--json", file).returncode == 0
    assert json.loads(file.read_text()) == json.loads((out / "besa_run.json").read_text())


def test_an_evaluation_of_the_dense_model_is_not_shown_as_that_of_the_pruned(pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "out")
    file = folder / "besa_eval.json"
    windows = ["--ppl", TINY / "heldout.txt", "--window", "64", "--max-windows", "2"]
    assert called("eval", TINY, *windows, "--json", file).returncode == 0
    assert_refused(called("report", folder, "--out", tmp_path / "report.html"), "was measured on another model")


def test_a_second_evaluation_is_added_to_the_first(pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "out")
    file, windows = folder / "besa_eval.json", ["--window", "64", "--max-windows", "2"]
    for text in ("heldout", "calibration"):
        result = called("eval", folder, "--ppl", TINY / f"{text}.txt", *windows, "--json", file, "--quiet")
        assert result.returncode == 0
    assert "heldout" not in result.stdout  # what was measured now
    found = json.loads(file.read_text())["perplexity"]
    assert list(found) == ["heldout", "calibration"]
    assert all(f"{value:,.2f}" in (folder / "README.md").read_text() for value in found.values())


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "small")
    assert_refused(
        called("generate", tmp_path / "small", "--prompt", "The city of the mountain"), "embeddings have 300"
    )


@pytest.mark.parametrize("sparsity", some_slow([0, 0.1], {0}))
def test_matrices_that_no_token_reached_are_told_where_something_was_pruned(sparsity: float, tmp_path: Path) -> None:
    text = ["--calibration", TINY / "calibration.txt", "--samples", "1", "--seqlen", "4"]
    few = [*text, "--recipe", "wanda", "--set", "experts.method=reap", "--set", "experts.share=0.25"]
    result = called("prune", MIXTURE, tmp_path / "out", *few, "--sparsity", sparsity)
    assert result.returncode == 0, result.stderr
    assert ("met no calibration token (experts) or zeros alone: pruned by weights" in result.stdout) == (sparsity > 0)


def test_an_explanation_runs_nothing(tmp_path: Path) -> None:
    asked = ["prune", TINY, tmp_path / "out", "--recipe", "wanda", "--explain"]
    assert called(*asked).returncode == 0
    for option in (["--resume"], ["--json-progress", tmp_path / "news.jsonl"]):
        refused = called(*asked, *option)
        assert_refused(refused, f"{option[0]} is not used, as --explain runs nothing: leave one of them out.")
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_package() -> None:
    assert called("--version").stdout == f"besa {version('besa-llm')}\n"


def test_a_misspelt_command_is_told_what_it_may_be() -> None:
    assert_refused(called("recipies"), "No such command 'recipies'. Did you mean 'recipes'? See `besa --help`.")


def test_a_plan_takes_the_options_that_decide_what_a_run_needs(tmp_path: Path) -> None:
    asked = ["plan", TINY, "--recipe", "best-int4", *SMALL, "--json", tmp_path / "plan.json"]
    plans = []
    for options in ([], ["--dequantized"], ["--minutes", "3"]):
        result = called(*asked, *options)
        assert result.returncode == 0, result.stderr
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
    coded, dense, timed = plans
    tensors = load_file(TINY / "model.safetensors").values()
    assert dense["checkpoint_bytes"] == sum(tensor.nbytes for tensor in tensors) > coded["checkpoint_bytes"]
    assert (coded["minutes"], timed["minutes"]) == (None, 3)
    blocks = ["--sparsity", "0.3", "--set", "allocation.blocks=2"]
    assert_refused(called("plan", TINY, "--recipe", "depth", *blocks), "allocation.blocks decides how much goes")
    assert_refused(called("plan", TINY, "--dequantized"), "--dequantized is not used: choose a recipe that quantises")
    assert_refused(called("plan", TINY, "--recipe", "best", "--minutes", "3", "--passes", "9"), "not both")


def test_no_arguments_show_the_commands() -> None:
    result = called()
    assert result.returncode == 0
    for command in ("demo", "prune", "eval", "inspect", "simulate", "report"):
        assert command in result.stdout


def test_ctrl_c_while_besa_is_imported() -> None:
    code = (
        "import builtins\nfrom besa.__main__ import main\nown = builtins.__import__\n"
        "def interrupted(name, *others):\n"
        "    if name == 'besa.cli': raise KeyboardInterrupt\n"
        "    return own(name, *others)\n"
        "builtins.__import__ = interrupted\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_a_gpu_without_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(compressing, "open_decoder", run_out)
    assert_refused(called("prune", TINY, "never", *SMALL), "The GPU has too little free memory")
    monkeypatch.undo()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)  # not as a model that cannot be read
    assert_refused(called("eval", TINY, "--ppl", TINY / "heldout.txt"), "The GPU has too little free memory")
    assert not Path("never.partial").exists()
