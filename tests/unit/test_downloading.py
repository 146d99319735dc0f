"""Progress of a download: what the bars of huggingface_hub are told goes to besa's progress, and nowhere else."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from besa.models.downloading import Download

BYTES = {"unit": "B", "unit_scale": True, "initial": 0}


def download(total: int) -> tuple[Download, list[float]]:
    done: list[float] = []

    def progress(so_far: float, of: float, note: str = "") -> None:
        assert (of, note) == (total, "downloading it")
        done.append(so_far)

    return Download(progress, total, "downloading it"), done


def test_of_several_bars_the_farthest_counts(capfd: pytest.CaptureFixture[str]) -> None:
    told, done = download(100)
    files, network, disk = told.bars(total=3, desc="Fetching"), told.bars(total=0, **BYTES), told.bars(total=0, **BYTES)
    files.update(3)
    network.update(30)
    disk.update(10)
    disk.update(30)
    network.update(-30)  # begun anew
    network.update(30)
    network.update(90)  # more than is in the files
    disk.update(60)
    assert done == [30, 40, 100]
    for bar in (files, network, disk):
        bar.set_postfix_str("fast", refresh=False)
        bar.refresh()
        bar.close()
    assert capfd.readouterr() == ("", "")


def test_nothing_is_told_where_nothing_comes() -> None:
    told, done = download(0)
    told.reach(0)
    told.bars(total=0, **BYTES).update(5)
    assert not done


def test_threads_lose_no_bytes() -> None:
    told, done = download(80_000)
    bar = told.bars(total=0, **BYTES)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [bar.update(1) for _ in range(10_000)])
    assert done[-1] == 80_000
    assert done == sorted(set(done))
