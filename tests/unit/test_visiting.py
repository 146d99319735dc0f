"""Modules that visit a device: each tensor goes there once, and what changed comes back once, into the same memory."""

import pytest
import torch
from torch import nn

from besa.models.source import locate
from besa.models.streaming import DecoderInMemory, DecoderOnDisk
from besa.models.visiting import Visit, copies, visiting
from tests import pretend

DEVICE = pretend.DEVICE


class Tied(nn.Module):
    """Two linears with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor([2.0]))
        self.requires_grad_(False)


@pytest.fixture
def module() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_it_is_there_and_back(module):
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    with visiting(module.modules(), DEVICE):
        there = dict(module.named_parameters()) | dict(module.named_buffers())
        assert {tensor.device for tensor in there.values()} == {DEVICE}
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in there.items())
        assert module.first.weight is module.second.weight
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(after[name] is tensor and tensor.data_ptr() == addresses[name] for name, tensor in before.items())


def test_only_what_changed_comes_back(module):
    pretend.reset()
    with torch.no_grad(), visiting(module.modules(), DEVICE):
        module.second.weight[1].mul_(0)  # through a view
    assert module.first.weight[1].tolist() == [0, 0, 0]
    assert module.first.weight is module.second.weight
    assert sorted(pretend.counts.to_device) == [4, 12, 36]
    assert set(pretend.counts.to_host) == {36}


def test_what_cannot_go_leaves_nothing_behind(module):
    """As when a device's memory runs out in the middle."""
    before = dict(module.named_parameters()) | dict(module.named_buffers())

    class Full(dict):
        def get(self, key, home):
            if key == id(module.scale):
                raise torch.OutOfMemoryError
            return home

    with pytest.raises(torch.OutOfMemoryError):
        Visit(module.modules(), DEVICE, Full({0: None}))
    assert all(tensor is before[name] for name, tensor in module.named_parameters())
    assert module.scale.device.type == "cpu"


def test_what_takes_the_place_of_a_tensor_comes_back_too(module):
    before = module.norm
    with visiting(module.modules(), DEVICE):
        module.norm = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).to(DEVICE), requires_grad=False)
    assert module.norm is before
    assert module.norm.tolist() == [1, 2, 3]


def test_after_an_error_it_is_back_too(module):
    with pytest.raises(KeyError), visiting(module.modules(), DEVICE):
        raise KeyError
    assert module.norm.device.type == "cpu"


def test_nothing_moves_that_is_there_already(module):
    weight = module.first.weight
    with visiting(module.modules(), torch.device("cpu")):
        assert module.first.weight is weight


def test_copies_that_came_before_are_used(module):
    ready = copies(module.modules(), DEVICE)
    pretend.reset()
    visit = Visit(module.modules(), DEVICE, ready)
    assert pretend.counts.to_device == []
    assert torch.equal(module.norm.cpu(), torch.ones(3))
    visit.end()
    visit.end()  # once more does nothing
    assert module.norm.device.type == "cpu"


def test_a_block_goes_once_and_comes_back_once(tiny_llama, tiny_llama_folder):
    """Also if its tensors are asked for before it is closed, as for the journal."""
    for decoder in (DecoderInMemory(tiny_llama), DecoderOnDisk(locate(tiny_llama_folder))):
        block = decoder.blocks[2]
        size = sum(parameter.numel() * 4 for parameter in block.module.parameters())
        pruned = {name: prunable.numel * 4 for name, prunable in block.prunables.items()}
        pretend.reset()
        with torch.no_grad(), decoder.opened(block, DEVICE):
            assert sum(pretend.counts.to_device) == size
            for name in pruned:
                block.weight(name)[0] = 0
            stored = decoder.stored(block)
        assert all(tensor.device.type == "cpu" for tensor in stored.values())
        assert all((stored[f"{decoder.name_in_files(name)}.weight"][0] == 0).all() for name in pruned)
        assert sum(pretend.counts.to_device) == size
        read = isinstance(decoder, DecoderOnDisk)  # else the norms are at home; a flag says that a tensor is finite
        assert sum(pretend.counts.to_host) == (size + len(stored) if read else sum(pruned.values()))


def test_a_block_that_did_not_change_does_not_come_back(tiny_llama):
    decoder = DecoderInMemory(tiny_llama)
    pretend.reset()
    with decoder.opened(decoder.blocks[0], DEVICE):
        pass
    assert pretend.counts.to_host == []


def test_what_is_outside_the_blocks_goes_too_and_stays_tied(tiny_llama, tiny_llama_folder):
    for decoder in (DecoderInMemory(tiny_llama), DecoderOnDisk(locate(tiny_llama_folder))):
        model = decoder.model
        with decoder.embeddings(DEVICE):
            assert model.get_input_embeddings().weight.device == DEVICE
            assert model.model.norm.weight.device == DEVICE
            assert model.model.rotary_emb.inv_freq.device == DEVICE
        with decoder.outside_blocks(DEVICE):
            assert model.lm_head.weight.device == DEVICE
            tied = model.lm_head.weight is model.get_input_embeddings().weight
            assert tied == model.config.tie_word_embeddings
        assert all(tensor.device != DEVICE for tensor in [*model.parameters(), *model.buffers()])
