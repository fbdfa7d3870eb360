"""How many threads a product may use, said by the thread that asks for it.

In torch that number is each thread's own, but a thread's first product takes over whatever number was set last by any
thread: a lookup that wants one thread would leave the model with one.
"""

from threading import Lock

import torch

_SETTING = Lock()


def use_threads(count: int) -> None:
    """The calling thread's products use so many threads from now on, whatever other threads set."""
    with _SETTING:
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count  # asking has this thread take the number over now
