"""What several processes that train one adapter have to agree on: who writes, when to stop, and which rows are whose.

Every function does the sensible thing in a training of one process. Knows torch.distributed, and nothing of how the
processes were started.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from triton_sft_pipeline.training.samples import IGNORED, Sample

if TYPE_CHECKING:
    from torch.utils.data import Sampler

T = TypeVar("T")


def world_size() -> int:
    """Processes of this training: what torchrun says in the environment, else one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK") or 0)


def decided_by_first(decide: Callable[[], T]) -> T:
    """Have rank 0 alone call `decide`, and give every process its answer (which has to be picklable)."""
    if world_size() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [decide() if rank() == 0 else None]
    return broadcast_object_list(answer)[0]


def any_wants(wish: bool, device: Any) -> bool:
    """Whether one process at least has the wish: what all of them have to do together, they do after the same step."""
    if world_size() == 1:
        return wish
    import torch

    wishes = torch.tensor(int(wish), device=device)
    torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
    return bool(wishes.item())


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        from accelerate.utils import wait_for_everyone

        wait_for_everyone()


def draw_differently(seed: int) -> None:
    """Give every process its own random numbers. Ranks with the same ones would drop the same elements of different
    rows; rank 0 keeps those of a training of one process."""
    if rank() > 0:
        import torch

        torch.manual_seed(seed + rank())


def fill_up(samples: list[Sample], multiple: int) -> list[Sample]:
    """`samples`, and as many without a token to learn as make their number a multiple of `multiple`.

    Without them, accelerate fills the last batches of an epoch with rows from its beginning, which would be learned
    twice: the last step would differ from the one that a single process takes.
    """
    missing = -len(samples) % multiple
    first = samples[0].input_ids[:2]
    documents = (len(first),) if samples[0].documents else ()
    return samples + [Sample("filling", first, [IGNORED] * len(first), documents)] * missing


def shuffled(rows: int, total: int, seed: int) -> Sampler[int]:
    """The order in which accelerate has a single process read `rows` rows, and after them the rest up to `total`.

    Set `epoch` on the result before every epoch.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    class Shuffled(Sampler[int]):
        # Not `set_epoch`: accelerate calls that with 0 when it goes on in the middle of a later epoch.
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            order = SeedableRandomSampler(range(rows), data_seed=seed)
            order.set_epoch(self.epoch)
            yield from order
            yield from range(rows, total)

        def __len__(self) -> int:
            return total

    return Shuffled()
