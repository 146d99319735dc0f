"""The real path through pip, with tiny wheels in a folder or on a local server instead of the package index."""

import dataclasses
import errno
import functools
import hashlib
import http.server
import os
import random
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from besa.data import assets
from besa.errors import BesaError

BIG = random.Random(0).randbytes(600_000)  # pip tells the progress of downloads above half a megabyte
SMALL = "naïve text\n".encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, holding one wheel with the assets "big" and "small"."""
    folder = tmp_path / "index" / "simple" / "besa-fake"
    folder.mkdir(parents=True)
    wheel = folder / "besa_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("besa_fake/big.bin", BIG)
        archive.writestr("besa_fake/data/small.txt", SMALL)
        archive.writestr("besa_fake-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: besa-fake\nVersion: 1.0\n")
        archive.writestr(
            "besa_fake-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("besa_fake-1.0.dist-info/RECORD", "")
    common = {"package": "besa-fake", "version": "1.0", "wheel_sha256": digest(wheel.read_bytes())}
    common |= {"licence": "CC0-1.0", "description": "a fake"}
    fakes = (
        assets.Asset(name="big", member="besa_fake/big.bin", member_sha256=digest(BIG), **common),
        assets.Asset(name="small", member="besa_fake/data/small.txt", member_sha256=digest(SMALL), **common),
    )
    monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in fakes})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def served(index, monkeypatch):
    """The same index behind HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=index.parent.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield index
        server.shutdown()


def cached() -> list[str]:
    return sorted(str(path.relative_to(assets.cache_dir())) for path in assets.cache_dir().rglob("*") if path.is_file())


def repin(monkeypatch, **changes):
    monkeypatch.setattr(
        assets, "ASSETS", {name: dataclasses.replace(asset, **changes) for name, asset in assets.ASSETS.items()}
    )


def refusal(name: str) -> str:
    with pytest.raises(BesaError) as caught:
        assets.fetch(name)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_one_download_serves_every_asset_of_the_wheel_and_then_none_is_needed(index, tmp_path):
    path = assets.fetch("big")
    assert path == tmp_path / "cache" / "besa-fake-1.0" / "big.bin"
    assert path.read_bytes() == BIG
    assert cached() == ["besa-fake-1.0/big.bin", "besa-fake-1.0/small.txt"]
    next(index.iterdir()).unlink()
    assert assets.fetch("big") == path
    assert assets.fetch("small").read_bytes() == SMALL


@pytest.mark.parametrize("damage", [SMALL[:-1], SMALL.upper()])
def test_a_damaged_file_is_fetched_again(index, damage):
    path = assets.cache_dir() / "besa-fake-1.0" / "small.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert assets.fetch("small").read_bytes() == SMALL


def test_a_wheel_with_another_checksum_is_refused(index, monkeypatch):
    repin(monkeypatch, wheel_sha256="0" * 64)
    assert "served another file as besa-fake==1.0" in refusal("small")
    assert cached() == []


def test_a_member_with_another_checksum_is_refused(index, monkeypatch):
    repin(monkeypatch, member_sha256="0" * 64)
    assert "besa_fake/big.bin in besa-fake==1.0" in refusal("small")
    assert cached() == []


def test_a_package_that_the_index_lacks(index):
    next(index.iterdir()).unlink()
    sentence = refusal("small")
    assert sentence.startswith(
        "Could not download besa-fake==1.0 from the package index (No matching distribution found for besa-fake==1.0):"
    )
    assert "BESA_CACHE" in sentence
    assert list(assets.cache_dir().iterdir()) == []


def test_an_unreachable_index_is_told_by_its_cause(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert f"({os.strerror(errno.ECONNREFUSED)})" in refusal("small")


def test_progress_hears_the_bytes_of_the_wheel(served):
    size = next(served.iterdir()).stat().st_size
    heard = []
    assets.fetch("small", lambda done, total, note="": heard.append((done, total, note)))
    assert heard[0] == (0, size, "downloading besa-fake==1.0")
    assert heard[-1] == (size, size, "downloading besa-fake==1.0")


def test_an_interrupted_download_leaves_nothing(served):
    def interrupt(done, total, note=""):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.fetch("small", interrupt)
    assert list(assets.cache_dir().iterdir()) == []


def test_two_fetches_at_once(index):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(assets.fetch, ["big", "small"]))
    assert [path.read_bytes() for path in paths] == [BIG, SMALL]
    assert cached() == ["besa-fake-1.0/big.bin", "besa-fake-1.0/small.txt"]


def test_a_cache_that_is_no_folder(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file"))
    assert "in the cache folder" in refusal("small")


def test_a_full_disk_while_unpacking(index, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    assert os.strerror(errno.ENOSPC) in refusal("small")
    assert cached() == []


def test_a_disk_too_small_for_the_wheel(served, monkeypatch):
    size = next(served.iterdir()).stat().st_size
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    assert os.strerror(errno.ENOSPC) in refusal("small")


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for pip is a shell script")
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            f"ERROR: Could not install packages due to an OSError: [Errno 28] {os.strerror(errno.ENOSPC)}",
            f"Could not keep besa-fake==1.0, which brings small, in the cache folder {{cache}} "
            f"({os.strerror(errno.ENOSPC)}):",
        ),
        (
            "WARNING: Retrying after connection broken by 'SSLError(1)': /simple\nERROR: No matching distribution",
            "Could not download besa-fake==1.0 from the package index (SSLError):",
        ),
        (
            "error: incomplete-download\n\n\xd7 Download failed after 6 attempts.\nhint: Use --resume-retries",
            "Could not download besa-fake==1.0 from the package index (Download failed after 6 attempts):",
        ),
        ("python: No module named pip\n\n", "package index (python: No module named pip):"),
        ("", "package index (pip gave no reason):"),
    ],
)
def test_what_pip_says_becomes_one_cause(index, tmp_path, monkeypatch, said, told):
    (tmp_path / "said").write_text(said)
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\ncat '{tmp_path / 'said'}' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert told.format(cache=assets.cache_dir()) in refusal("small")


@pytest.mark.parametrize("path", [None, "", "."])
def test_code_of_the_working_folder_is_not_run(index, tmp_path, monkeypatch, path):
    """A `pip.py`, or what Python itself imports as it starts, beside the user or where a PYTHONPATH says."""
    (hostile := tmp_path / "hostile").mkdir()
    for name in ("pip", "usercustomize", "sitecustomize", "zipfile", "random"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(hostile)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    assert assets.fetch("small").read_bytes() == SMALL
    assert not (tmp_path / "ran").exists()


def test_what_the_user_set_for_pip_holds(index, tmp_path, monkeypatch):
    """A configuration file, and paths in it and in the environment that are relative to the folder the user is in."""
    monkeypatch.delenv("PIP_FIND_LINKS")
    (tmp_path / "pip.conf").write_text("[global]\nfind-links = index/simple/besa-fake\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", "pip.conf")
    monkeypatch.chdir(tmp_path)
    assert assets.fetch("small").read_bytes() == SMALL


def test_an_unknown_name(index):
    assert refusal("medium") == "There is no embedded asset 'medium': choose one of big, small."


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("BESA_CACHE")
    assert assets.cache_dir() == Path(assets.platformdirs.user_cache_dir("besa"))


def test_the_pins_agree_with_each_other():
    wheels = {}
    for name, asset in assets.ASSETS.items():
        assert name == asset.name
        assert len(asset.wheel_sha256) == len(asset.member_sha256) == 64
        assert wheels.setdefault(asset.requirement, asset.wheel_sha256) == asset.wheel_sha256
    assert len({asset.path for asset in assets.ASSETS.values()}) == len(assets.ASSETS)
