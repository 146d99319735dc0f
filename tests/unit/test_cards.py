"""Model cards: what they say of a checkpoint, what an evaluation changes in them, and what it must not."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from safetensors.torch import save_file

from besa.checkpoint.card_text import BEGIN, END
from besa.checkpoint.cards import refresh_card, write_card
from besa.checkpoint.measurements import NOTHING, Measurement, Measurements
from besa.errors import Notice
from besa.evaluation.carding import TASK_SETS, measurements_of, tell_card, update_card
from besa.evaluation.perplexity import Perplexity
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import TEST_SETS
from besa.evaluation.zero_shot import DEFINITIONS, Accuracy, ZeroShot
from besa.methods.recipe import Recipe
from besa.record import RECORD_NAME

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAINED = "a/b-7B"


def folder_of(tmp_path: Path, config: dict[str, Any] | None = None, **record: Any) -> Path:
    """A folder with all of a checkpoint that a card is made from."""
    folder = tmp_path / "out"
    folder.mkdir()
    about = {
        "created": "2026-01-02T03:04:05+00:00",
        "recipe": Recipe.load("besa").model_dump(mode="json"),
        "seed": 7,
        "model": {"source": TRAINED, "revision": COMMIT, "parameters": 3000},
        "calibration": {"source": "c4", "samples": 128, "seqlen": 2048},
        "versions": {"besa": "0.9.8"},
        "machine": {},
        "blocks": [],
        "weights": 2000,
        "zeros": 1001,
        "sparsity": 0.5005,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
    }
    (folder / RECORD_NAME).write_text(json.dumps(about | record))
    (folder / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "besa": {"sparsity": 0.5005}} | (config or {}))
    )
    return folder


def base_of(tmp_path: Path, card: str | bytes) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    return base


def evaluation_of(**changes: Any) -> Evaluation:
    about: dict[str, Any] = {
        "model": "out",
        "perplexity": {"wikitext2": 12.5, "mine": 30.25},
        "window": 2048,
        "details": {
            "wikitext2": Perplexity(perplexity=12.5, windows=141, predicted=141 * 2047),
            "mine": Perplexity(perplexity=30.25, windows=3, predicted=3 * 2048, bos=True),
        },
        "other_windows": {512: {"wikitext2": Perplexity(perplexity=math.inf, windows=560, predicted=560 * 511)}},
        "sources": {"wikitext2": "hub", "mine": "/home/me/mine.txt"},
        "notes": ["--window 2048 is more than the model was trained for."],
        "zero_shot": ZeroShot(
            tasks={
                "piqa": Accuracy(
                    acc=0.75, acc_stderr=0.01, acc_norm=0.76, acc_norm_stderr=0.02, questions=1838, version=1
                ),
                "boolq": Accuracy(acc=0.625, acc_stderr=None, questions=3270, version=2),
            },
            mean=0.6875,
            source="embedded",
            limit=None,
            lm_eval="0.4",
        ),
        "sparsity": 0.5005,
        "created": "2026-03-04T05:06:07+00:00",
        "versions": {"besa": "0.9.9"},
    }
    return Evaluation(**about | changes)


def row_of(card: ModelCard, name: str) -> str:
    """A cell of the table of facts."""
    (cell,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card.text, re.MULTILINE)
    return str(cell)


# What a new card says.


def test_a_card_says_what_the_record_says(tmp_path: Path) -> None:
    base = base_of(tmp_path, "---\nlicense: apache-2.0\nlanguage: [en, de]\nmetrics: [x]\n---\n# Dense")
    folder = folder_of(tmp_path)
    write_card(folder, base)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": TRAINED,
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["besa", "pruned", "sparse"],
    }
    assert f"[{TRAINED}](https://huggingface.co/{TRAINED})" in row_of(card, "made from")
    assert COMMIT[:12] in row_of(card, "made from")
    assert row_of(card, "recipe") == "`besa`, seed 7"
    assert row_of(card, "sparsity of the pruned matrices") == "50.05 %: 1,001 of 2,000 weights were set to zero"
    assert row_of(card, "sparsity of all parameters") == "33.3667 % of 3,000, embeddings included"
    assert row_of(card, "stored as") == "dense safetensors, `bfloat16`"
    assert row_of(card, "calibrated on") == "`c4`, 128 sequences of 2,048 tokens"
    assert row_of(card, "pruned by besa") == "`0.9.8`"
    (recipe,) = re.findall(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)
    assert yaml.safe_load(recipe) == Recipe.load("besa").model_dump(mode="json")
    assert "Nothing yet." in card.text
    assert "English web text" in card.text
    assert "The licence is that" not in card.text
    assert "Dense" not in card.text


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("mix", "tokens, which is web text, encyclopedia, source code, technical text and several languages, alone"),
        ("mine.txt", "`mine.txt`, 128 sequences of 2,048 tokens alone"),
    ],
)
def test_a_card_says_what_kind_of_text_decided(source: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, calibration={"source": source, "samples": 128, "seqlen": 2048})
    write_card(folder, None)
    assert kind in ModelCard.load(folder / "README.md").text


def test_cards_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_card(folder, None)
    first = (folder / "README.md").read_text()
    refresh_card(folder, NOTHING)
    assert (folder / "README.md").read_text() == first
    (folder / "README.md").unlink()
    write_card(folder, None)
    assert (folder / "README.md").read_text() == first


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ({"source": TRAINED, "revision": COMMIT}, TRAINED),
        ({"source": "gpt2", "revision": COMMIT}, "gpt2"),
        ({"source": "models/mine", "revision": None}, None),  # a folder that might be an id
        ({"source": "/home/me/mine", "revision": COMMIT}, None),
        ({"source": "", "revision": COMMIT}, None),
        ({"source": "smollm2", "revision": None}, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ({}, None),
    ],
)
def test_only_an_id_on_the_hub_is_a_base_model(model: dict[str, Any], base: str | None, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, model=model)
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict().get("base_model") == base
    assert card.data.to_dict().get("license") == ("apache-2.0" if model.get("source") == "smollm2" else None)
    assert "/home/me" not in card.content


def test_patterns_codes_and_bitmasks_are_said(tmp_path: Path) -> None:
    recipe = Recipe.load("besa-int4").model_dump(mode="json")
    folder = folder_of(tmp_path, {"quantization_config": {"quant_method": "compressed-tensors"}}, recipe=recipe)
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.tags == ["besa", "pruned", "sparse", "4-bit"]
    assert row_of(card, "quantised to") == "4 bits, stored as codes"
    assert row_of(card, "stored as") == "codes (pack-quantized), `bfloat16`"
    assert "pip install transformers compressed-tensors" in card.text

    recipe = Recipe.load("wanda", overrides=["allocation.method=nm"]).model_dump(mode="json")
    (folder / RECORD_NAME).write_text(json.dumps(json.loads((folder / RECORD_NAME).read_text()) | {"recipe": recipe}))
    about = {"dtype": "bfloat16", "auto_map": {"AutoConfig": "x.Y"}, "quantization_config": {"quant_method": "besa"}}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({}, folder / "bitmask.safetensors")
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert "base_model_relation" not in card.data.to_dict()
    assert card.data.tags == ["besa", "pruned", "sparse", "2:4", "bitmask"]
    assert row_of(card, "pattern").startswith("2:4, ")
    assert row_of(card, "stored as") == "bitmasks and kept values, `bfloat16`"
    assert "pip install besa-llm\n```" in card.text
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card.text


def test_what_was_removed_after_pruning_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"besa": {"shrunk": {"ffn": [256, 160], "rows": [1, 2], "heads": 3}}})
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert row_of(card, "removed") == "feed-forward channels that nothing read: 160 of 256 are left in each block"
    assert row_of(card, "sparsity of the pruned matrices before the removal").startswith("50.05 %")


def test_a_card_names_what_the_model_had_been_made_by_before(tmp_path: Path) -> None:
    runs = [
        {
            "recipe": "wanda",
            "sparsity": 0.3,
            "seed": 1,
            "calibration": ["/home/me/a.txt", "c4"],
            "created": "2026-01-01T",
        },
        {"shrunk": {"ffn": [256, 160]}},
    ]
    folder = folder_of(tmp_path, {"besa": {"shrunk": {"ffn": [256, 160]}, "head": "int8"}}, earlier=runs)
    write_card(folder, None)
    text = (folder / "README.md").read_text()
    assert (
        "| pruned before | `wanda`, 30 % of the pruned matrices set to zero, seed 1, calibrated on `a.txt` and `c4`, "
        "2026-01-01 |\n"
        "| pruned before | then removed: feed-forward channels from 256 to 160 |\n"
    ) in text
    assert "/home/me" not in text
    assert row_of(ModelCard(text), "sparsity of the pruned matrices").startswith("50.05 %")  # after that removal
    assert "`besa pack` stores them away" in text
    assert row_of(ModelCard(text), "removed").startswith("feed-forward channels that nothing read: 160 of 256")
    config = json.loads((folder / "config.json").read_text()) | {"besa": {"shrunk": {"ffn": [256, 120]}}}
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert row_of(card, "sparsity of the pruned matrices before the removal").startswith("50.05 %")


def test_widths_of_their_own_are_a_removal_too(tmp_path: Path) -> None:
    said = {"quant_method": "besa_widths", "version": 1, "ffn": [160, 192], "heads": [2, 2]}
    folder = folder_of(tmp_path, {"quantization_config": said})
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert row_of(card, "sparsity of the pruned matrices before the removal").startswith("50.05 %")
    assert row_of(card, "sparsity of all parameters before the removal").startswith("33.3667 %")
    assert card.data.tags == ["besa", "pruned"]  # its zeros are gone


def test_zeros_are_a_share_of_the_parameters_that_are_left(tmp_path: Path) -> None:
    mixture = {"name": "model.layers.0.mlp", "experts": 4, "gone": [2], "scores": [3, 2, 1, 4], "tokens": [9, 9, 9, 9]}
    folder = folder_of(tmp_path, mixtures=[mixture], dropped=500)
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert row_of(card, "sparsity of all parameters") == "40.04 % of 2,500, embeddings included"
    assert row_of(card, "experts") == "3 of 4 are left in each of 1 mixtures; 500 parameters went with the others"


@pytest.mark.parametrize("record", ["absent", '{"files": {}}', '{"recipe": 1}', "{"])
def test_a_model_without_a_record_has_a_card_that_says_so(record: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / RECORD_NAME).write_text(record)
    if record == "absent":
        (folder / RECORD_NAME).unlink()
    write_card(folder, None, (TRAINED, COMMIT))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == TRAINED
    assert "came without a record" in card.text
    assert "set to zero" not in card.text


# The licence, from a card that others wrote.


@pytest.mark.parametrize(
    ("metadata", "taken"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: llama3.2\nlicense_link: https://huggingface.co/meta/blob/main/LICENSE.txt",
            {
                "license": "other",
                "license_name": "llama3.2",
                "license_link": "https://huggingface.co/meta/blob/main/LICENSE.txt",
            },
        ),
        ("license: other\nlicense_name: Some Licence 2\nlicense_link: LICENSE", {"license_name": "Some Licence 2"}),
        ("language: zh-Hant", {"language": "zh-Hant"}),
        ("tags: [x]", {}),
        ("", {}),
    ],
)
def test_licence_and_languages_are_taken_over(metadata: str, taken: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_card(folder, base_of(tmp_path, f"---\n{metadata}\n---\ntext"))
    found = ModelCard.load(folder / "README.md").data.to_dict()
    assert found.items() >= taken.items()
    assert ("The licence is that of" in (folder / "README.md").read_text()) == ("license" not in found)


@pytest.mark.parametrize("card", ["# No metadata", "", "---\n\n---\n"])
def test_a_card_that_says_nothing_is_no_damage(card: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_card(folder_of(tmp_path), base_of(tmp_path, card))
    assert not caplog.records


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nlicense: []\n---\n",
        "---\nlicense: 'a\n\n  b'\n---\n",
        "---\nlicense: '<script>'\n---\n",
        f"---\nlicense: {'x' * 65}\n---\n",
        "---\nlicense: other\nlicense_link: 'javascript:alert(1)'\n---\n",
        "---\nlicense: other\nlicense_link: 'https://a b'\n---\n",
        "---\nlicense: other\nlicense_name: 'a | b`'\n---\n",
        '---\nlicense: other\nlicense_name: "a\\u202eb"\n---\n',
        "---\nlicense: mit\nlanguage: no\n---\n",  # YAML's false
        "---\n- license\n---\n",
        "---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
        "---\na: &a [x]\nb: &b [*a, *a]\nlanguage: [*b, *b]\n---\n",
        f"---\nx: {'[' * 2000}\n---\n",
        b"---\nlicense: \xff\n---\n",
        f"---\nlicense: mit\n---\n{'x' * (1 << 20)}",
    ],
    ids=range(18),
)
def test_of_a_damaged_card_nothing_is_taken_and_a_notice_says_so(card: str | bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.warns(Notice, match=r"^The licence was not taken over from [^\n]+\.$") as notices:
        write_card(folder, base_of(tmp_path, card))
    assert len(notices) == 1
    assert (
        not {"license", "license_name", "license_link", "language"}
        & ModelCard.load(folder / "README.md").data.to_dict().keys()
    )


# Text that others wrote stays text.


def test_names_from_elsewhere_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = f"a|b`c\n{END}\n# <b>\x1b[31m ```"
    recipe = Recipe.load("besa").model_dump(mode="json") | {"name": evil, "skip": [evil, "```"]}
    folder = folder_of(
        tmp_path,
        {"dtype": f"{evil}\ud800"},
        recipe=recipe,
        model={"source": evil},
        versions={"besa": evil},
        dense={evil: 3},
    )
    write_card(folder, None)
    card = ModelCard.load(folder / "README.md")
    assert re.findall("^#.*", card.text, re.MULTILINE)[1:] == [
        "## Measured", "## Use", "## Limits", "## Recipe"
    ]  # fmt: skip
    assert len(re.findall(f"^{re.escape(END)}$", card.text, re.MULTILINE)) == 1
    assert "\x1b" not in card.text
    for line in re.findall(r"^\|.*", card.text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    again = (folder / "README.md").read_bytes()
    refresh_card(folder, NOTHING)
    assert (folder / "README.md").read_bytes() == again


# What an evaluation changes.


def test_an_evaluation_is_in_the_text_and_in_what_the_hub_reads(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_card(folder, None)
    (folder / "besa_eval.json").write_text(evaluation_of().model_dump_json())
    tell_card(folder / "besa_eval.json", str(folder))
    card = ModelCard.load(folder / "README.md")
    found = {
        (result.dataset_name, result.dataset_type, result.dataset_config, result.dataset_split, result.metric_name): (
            result.metric_type,
            result.metric_value,
            result.metric_args,
        )
        for result in card.data.eval_results
    }
    by = {"measured_by": "besa 0.9.9"}
    wikitext = ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert found == {
        (*wikitext, "perplexity (141 windows of 2,048 tokens)"): ("perplexity", 12.5, by),
        ("mine", "mine", None, None, "perplexity (3 windows of 2,048 tokens with BOS)"): ("perplexity", 30.25, by),
        (*wikitext, "perplexity (560 windows of 512 tokens)"): ("perplexity", "infinite", by),
        ("piqa", "baber/piqa", None, "validation", "acc (1,838 questions, zero-shot)"): (
            "acc", 0.75, by | {"stderr": 0.01},
        ),
        ("piqa", "baber/piqa", None, "validation", "acc_norm (1,838 questions, zero-shot)"): (
            "acc_norm", 0.76, by | {"stderr": 0.02},
        ),
        ("boolq", "aps/super_glue", "boolq", "validation", "acc (3,270 questions, zero-shot)"): ("acc", 0.625, by),
    }  # fmt: skip
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}
    index = card.data.to_dict()["model-index"]
    assert index[0]["name"] == "out"
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    json.dumps(index, allow_nan=False)  # as the Hub stores it
    for line in (
        "| `wikitext2` | perplexity | 141 windows of 2,048 tokens | 12.50 |  |",
        "| `mine` | perplexity | 3 windows of 2,048 tokens with BOS | 30.25 |  |",
        "| `wikitext2` | perplexity | 560 windows of 512 tokens | ∞ |  |",
        "| `piqa` | acc | 1,838 questions, zero-shot | 0.7500 | 0.0100 |",
        "| `boolq` | acc | 3,270 questions, zero-shot | 0.6250 |  |",
        "By `besa eval` of `0.9.9`, 2026-03-04.",
        "- --window 2048 is more than the model was trained for.",
    ):
        assert line in card.text.splitlines(), line
    assert "Nothing" not in card.text
    assert "/home/me" not in card.content


def test_a_newer_evaluation_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_card(folder, None)
    unmeasured = (folder / "README.md").read_text()
    refresh_card(folder, measurements_of(evaluation_of()))
    only = evaluation_of(other_windows={}, zero_shot=None, notes=[])
    refresh_card(folder, measurements_of(only))
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 2
    refresh_card(folder, NOTHING)
    assert (folder / "README.md").read_text() == unmeasured


def test_what_a_user_wrote_survives(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_card(folder, None)
    card = RepoCard((folder / "README.md").read_text())
    card.data["license"] = "mit"
    card.data["tags"] = ["mine", "besa"]
    card.data["thumbnail"] = "https://a/b.png"
    own = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "Salesforce/wikitext", "name": "theirs", "config": "wikitext-2-raw-v1", "split": "test"},
        "metrics": [{"type": "perplexity", "value": 11.0}],
    }
    card.data["model-index"] = [{"name": "mine", "results": [own]}]
    card.text = f"Before, ümlaut.\n{card.text}\nAfter.\n"
    (folder / "README.md").write_text(str(card))
    for measurements in (measurements_of(evaluation_of()), measurements_of(evaluation_of(zero_shot=None)), NOTHING):
        refresh_card(folder, measurements, "me/mine")
        found = RepoCard((folder / "README.md").read_text())
        data = found.data.to_dict()
        assert {key: data[key] for key in ("license", "tags", "thumbnail")} == {
            "license": "mit", "tags": ["mine", "besa"], "thumbnail": "https://a/b.png",
        }  # fmt: skip
        (entry,) = data["model-index"]
        assert entry["name"] == "mine"
        assert entry["results"][0] == own
        ModelCard.load(folder / "README.md")
        assert found.text.startswith("Before, ümlaut.\n")
        assert found.text.endswith("\nAfter.\n")
        assert found.text.count(BEGIN) == found.text.count(END) == 1
        assert 'from_pretrained("me/mine")' in found.text
        assert "The licence is that of" not in found.text


@pytest.mark.parametrize("text", ["# All mine\n", f"---\nlicense: mit\n---\n{END}\nmine\n{BEGIN}\n", f"{BEGIN}\nmine"])
def test_of_a_card_without_marks_the_text_stays(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path)
    (folder / "README.md").write_text(text)
    refresh_card(folder, NOTHING)
    assert (folder / "README.md").read_text() == text
    refresh_card(folder, Measurements([Measurement("a", "a", "perplexity", 2.0, "one window")]))
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == 2.0
    assert card.text == text.rpartition("---\n")[2]
    assert not caplog.records


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\nmine",
        b"---\n- a\n---\nmine",
        b"---\nmodel-index: mine\n---\n",
        b"---\nmodel-index:\n- results: 3\n---\n",
        b"---\n1: 2\n---\n",
        b"\xff",
        b"x" * (1 + (1 << 20)),
    ],
)
def test_a_card_that_cannot_be_read_stays(card: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "README.md").write_bytes(card)
    with pytest.warns(Notice, match=r"README\.md was left as it is, [^\n]+\.$"):
        refresh_card(folder, measurements_of(evaluation_of()))
    assert (folder / "README.md").read_bytes() == card


@pytest.mark.parametrize("other", [{"sparsity": None}, {"pruned": "2026-01-05T09:12:45+00:00"}])
def test_an_evaluation_of_another_model_is_not_shown(other: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_card(folder, None)
    before = (folder / "README.md").read_text()
    (folder / "besa_eval.json").write_text(evaluation_of(**other).model_dump_json())
    with pytest.warns(Notice, match=r"besa_eval\.json is of another model"):
        update_card(folder)
    assert (folder / "README.md").read_text() == before


def test_only_the_folder_of_the_model_gets_news(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for file, model in [
        (folder / "other.json", str(folder)),
        (folder / "besa_eval.json", "a/b"),
        (folder / "besa_eval.json", str(tmp_path)),
    ]:
        file.write_text(evaluation_of().model_dump_json())
        tell_card(file, model)
        assert not (folder / "README.md").exists()
    (folder / RECORD_NAME).rename(folder / "kept")  # a folder of another tool is not besa's to write in
    tell_card(folder / "besa_eval.json", str(folder))
    assert not (folder / "README.md").exists()
    (folder / "kept").rename(folder / RECORD_NAME)
    tell_card(folder / "besa_eval.json", str(folder))
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 6


def test_data_sets_are_those_that_are_measured() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = Path(lm_eval.__file__).parent / "tasks"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    for task, file in DEFINITIONS.items():
        about = yaml.load((tasks / file).read_text(), Loader)
        if "include" in about:
            about = yaml.load((tasks / file).with_name(about["include"]).read_text(), Loader) | about
        split = about.get("test_split") or about["validation_split"]
        assert TASK_SETS[task] == (about["dataset_path"], about.get("dataset_name"), split), task
    evaluation = evaluation_of(
        perplexity={},
        details={name: Perplexity(perplexity=2, windows=1, predicted=1) for name in [*TEST_SETS, "hf:a/b:c:d"]},
        sources=dict.fromkeys(TEST_SETS, "hub") | {"hf:a/b:c:d": "hf:a/b:c:d"},
        other_windows={},
        zero_shot=None,
    )
    assert [(row.dataset, row.config, row.split) for row in measurements_of(evaluation).rows] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test"),
        ("allenai/c4", None, "validation"),
        ("a/b", "c", "d"),
    ]
    local = evaluation.model_copy(update={"sources": dict.fromkeys(TEST_SETS, "my c4.jsonl")})
    assert {row.dataset for row in measurements_of(local).rows} == {"my-c4.jsonl", "a/b"}
