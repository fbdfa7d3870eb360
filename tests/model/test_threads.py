"""The number of threads is each thread's own."""

import threading

import torch

from model.threads import use_threads


def test_what_another_thread_sets_is_not_taken_over() -> None:
    """With torch's own function alone, the model's thread would find 1 at its first product."""
    found: list[int] = []
    set_here, set_there = threading.Event(), threading.Event()

    def model() -> None:
        use_threads(2)
        set_here.set()
        set_there.wait()
        found.append(torch.get_num_threads())

    def lookup() -> None:
        set_here.wait()
        use_threads(1)
        found.append(torch.get_num_threads())
        set_there.set()

    before = torch.get_num_threads()
    threads = [threading.Thread(target=run) for run in (model, lookup)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    use_threads(before)
    assert found == [1, 2]
