"""`save_pretrained` of models that plain transformers cannot load: the weight files get names that it does not read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from besa.checkpoint.companions import OWN
from besa.errors import BesaError
from besa.storage.weights import INDEX, NAMES, STEM
from besa.storage.writing import write_file


@contextmanager
def saving(
    model: PreTrainedModel, folder: Path, stem: str, options: dict[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Save a model as transformers would; yield the folder and its config.json, to change before the files are moved.

    Args:
        model: whose class saves it.
        folder: to fill; what an earlier save left in it is replaced.
        stem: beginning of the names of weight files.
        options: as of transformers' method.

    Raises:
        BesaError: the model was to be pushed at the same time, or its files were to have another name.
    """
    if options.pop("push_to_hub", False):
        raise BesaError("This model is saved first, and then pushed: call `model.push_to_hub` or `besa push`.")
    if options.pop("variant", None):
        raise BesaError("The weight files of this model have a name of their own: save it without a variant.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        made = Path(temporary)
        type(model).save_pretrained(model, made, **options)
        for path in made.glob(f"{STEM}*.safetensors"):
            path.rename(made / path.name.replace(STEM, stem, 1))
        if (index := made / f"{STEM}{INDEX}").exists():
            content = json.loads(index.read_text(encoding="utf-8"))
            places = content["weight_map"].items()
            content["weight_map"] = {name: file.replace(STEM, stem, 1) for name, file in places}
            write_file(made / f"{stem}{INDEX}", json.dumps(content, indent=2) + "\n")
            index.unlink()
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        yield made, config
        write_file(made / "config.json", json.dumps(config, indent=2) + "\n")
        new = sorted((path.name for path in made.iterdir()), key=lambda name: (name == "config.json", name))
        for name in new:  # config.json last: it says how the weights are read
            (made / name).replace(folder / name)
        for path in [path for path in folder.iterdir() if NAMES.fullmatch(path.name) or fnmatch(path.name, OWN)]:
            if path.name not in new:  # of an earlier save: weights that would be read instead, or what was recorded
                path.unlink()
