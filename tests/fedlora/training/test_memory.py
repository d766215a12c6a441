"""Peaks of memory, against blocks of known size."""

import threading

import numpy as np
import pytest
import torch

from fedlora.training import memory

BLOCK = 200 * 2**20


def held(size: int = BLOCK) -> int:
    return int(np.ones(size, dtype=np.uint8)[-1])  # written to, so that it is resident; given back at once


def test_what_was_held_within_counts_and_what_was_before_or_after_does_not():
    held(2 * BLOCK)
    with memory.watched("cpu") as before:
        pass
    with memory.watched("cpu") as within:
        held()
    held(2 * BLOCK)
    assert 0.8 * BLOCK < within.bytes - before.bytes < 1.5 * BLOCK


def test_a_watch_does_not_end_another_that_is_under_way():
    begun, done = threading.Event(), threading.Event()
    found = []

    def other():
        begun.wait(30)
        with memory.watched("cpu") as watch:
            pass
        found.append(watch.bytes)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with memory.watched("cpu") as outer:
        held()
        begun.set()
        assert done.wait(30)
    thread.join()
    assert outer.bytes - found[0] > 0.8 * BLOCK


def test_where_no_mark_can_be_set_back_it_is_the_peak_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_LINUX", tmp_path / "nowhere")
    with memory.watched("cpu") as watch:
        pass
    assert watch.bytes >= memory.peak("cpu") > 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_it_is_what_was_allocated_there():
    before = torch.cuda.memory_allocated("cuda:0")
    with memory.watched("cuda:0") as watch:
        torch.ones(BLOCK, dtype=torch.uint8, device="cuda:0")
    assert before + BLOCK <= watch.bytes < before + BLOCK + 2**22
