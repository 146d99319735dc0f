"""What a launcher's variables mean, and what ranks say that do not find the others."""

import socket
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from besa.errors import BesaError, ToldError
from besa.system import joining, watching
from besa.system.devices import named_device, resolve_device
from besa.system.joining import Launch, joined
from besa.system.processes import launched
from besa.system.ranks import count, together
from tests.forked import free_port

VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
KEPT = "TORCHELASTIC_USE_AGENT_STORE"


@pytest.fixture
def variables(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(KEPT, raising=False)
    monkeypatch.setattr(joining, "COMING", 0.3)
    monkeypatch.setattr(watching, "GRACE", 0.0)


def launch(number=0, count=3, place=0, port=1, kept=True):
    return Launch(number, count, place, "127.0.0.1", port, kept)


def refusal(function, *arguments):
    with pytest.raises(BesaError) as refused:
        function(*arguments)
    return refused.value


def test_the_variables_say_who_is_who(variables, monkeypatch):
    assert launched()
    read = Launch.read()
    assert read == Launch(3, 4, 1, "node0", 29500, False)
    assert read.address == "node0:29500"
    assert not read.has_store
    monkeypatch.setenv("RANK", "0")
    assert Launch.read().has_store
    monkeypatch.setenv(KEPT, "True")
    assert not Launch.read().has_store


@pytest.mark.parametrize("value", [None, "1"])
def test_one_process_is_alone(variables, monkeypatch, value):
    monkeypatch.delenv("WORLD_SIZE") if value is None else monkeypatch.setenv("WORLD_SIZE", value)
    assert not launched()
    with joined():
        assert count() == 1


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(variables, monkeypatch, name):
    monkeypatch.delenv(name)
    assert str(refusal(Launch.read)) == (
        f"WORLD_SIZE is set, but {name} is not: start several ranks by torchrun, which sets both."
    )


@pytest.mark.parametrize(
    ("name", "value", "numbers"),
    [
        ("WORLD_SIZE", "two", "1"),
        ("WORLD_SIZE", "0", "1"),
        ("RANK", "4", "0 up to 3"),
        ("RANK", "-1", "0 up to 3"),
        ("LOCAL_RANK", "1.5", "0 up to 3"),
        ("MASTER_PORT", "70000", "1 up to 65535"),
    ],
)
def test_a_variable_that_is_no_such_number_is_refused(variables, monkeypatch, name, value, numbers):
    monkeypatch.setenv(name, value)
    assert str(refusal(Launch.read)) == (
        f"{name} is {value}, not a number from {numbers}: start ranks by torchrun, which sets it."
    )


def test_an_address_where_nobody_answers_is_named(variables):
    port = free_port()
    words = "within 0 s (Connection refused): check --master-addr, --master-port and the network."
    error = refusal(joining._reach, launch(2, 3, 0, port))
    assert str(error) == f"Rank 2 on {socket.gethostname()} has not reached 127.0.0.1:{port} {words}"
    assert not isinstance(error, ToldError)
    assert isinstance(refusal(joining._reach, launch(2, 3, 1, port)), ToldError)  # rank 1 is beside it, and says it


def test_ranks_find_each_other(variables):
    store, found = HashStore(), {}

    def meet(number):
        found[number] = joining._meet(store, launch(number), ["prune", "a model"])

    threads = [threading.Thread(target=meet, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert [entry["member"]["number"] for entry in found[0]] == [0, 1, 2]
    assert {entry["member"]["host"] for entry in found[0]} == {socket.gethostname()}
    assert all(entry["command"] == ["prune", "a model"] for entry in found[0])


def test_ranks_that_do_not_come_are_named_once(variables):
    store = HashStore()
    error = refusal(joining._meet, store, launch(0), [])
    assert not isinstance(error, ToldError)
    assert str(error) == (
        "Ranks 1, 2 of 3 have not come within 0 s: see whether they were started, and reach 127.0.0.1:1."
    )
    error = refusal(joining._meet, store, launch(2), [])
    assert isinstance(error, ToldError)
    assert str(error).startswith("Rank 1 of 3 has not come within 0 s: see whether it was started, and reaches ")


def test_all_run_the_same(variables):
    entries = [{"version": "1", "command": ["prune", "a"]} for _ in range(3)]
    joining._check_alike(entries)
    entries[2]["command"] = ["prune", "b"]
    assert str(refusal(joining._check_alike, entries)) == (
        "Ranks 0 and 2 have different commands: prune a, and prune b: start all alike."
    )
    entries[1]["version"] = "2"
    assert str(refusal(joining._check_alike, entries)) == (
        "Ranks 0 and 1 have different versions: 1, and 2: start all alike."
    )


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_each_rank_of_a_machine_has_its_own_gpu(two_gpus):
    for place in range(2):
        with together(4 + place, 8, place=place):
            assert named_device("auto") == named_device("cuda") == torch.device("cuda", place)


def test_the_gpu_of_another_rank_is_refused(two_gpus):
    with together(5, 8, place=1):
        assert str(refusal(resolve_device, "cuda:0")) == (
            "Rank 5 computes on cuda:1, not on cuda:0: use --device cuda, which gives each rank its own."
        )


def test_more_ranks_than_gpus_are_refused(two_gpus):
    with together(6, 8, place=2):
        assert resolve_device("cpu") == torch.device("cpu")
        for name in ("auto", "cuda", "cuda:0"):
            assert str(refusal(resolve_device, name)) == (
                "Rank 6 has no CUDA device of its own: torch finds 2 here, so start no more ranks on this machine, or "
                "use --device cpu."
            )
