"""The shards of `lgvit predict` answered by actors of Ray Data, on this machine or on a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from .ray_cluster import check_cpus, cluster

Rows = list[dict[str, Any]]


class ShardAnswers:
    """What an actor does: numbers of shards in, their rows out; images are read where they are answered.

    Args:
        work (`Callable`): Rows of the sources of one shard.
        images (`Sequence`): All sources; pickled with the actor, so that those of a dataset are opened by each.
        shards (`Sequence[range]`): Numbers of the images of each shard.

    Example:

        >>> shards = [range(3), range(3, 4)]
        >>> answers = ShardAnswers(lambda sources: [{"path": name} for name in sources], "abcd", shards)
        >>> answers({"shard": np.array([1])})["rows"].tolist()
        ['[{"path": "d"}]']
    """

    def __init__(self, work: Callable[[list[Any]], Rows], images: Any, shards: Sequence[range]) -> None:
        self.work, self.images, self.shards = work, images, shards

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer the shards of a batch."""
        found = [self.work([self.images[number] for number in self.shards[shard]]) for shard in batch["shard"]]
        return {"shard": batch["shard"], "rows": np.array([json.dumps(rows) for rows in found], dtype=object)}


def answered_by_ray(answers: ShardAnswers, workers: int) -> Generator[tuple[int, Rows], None, None]:
    """The rows of each shard with its number, as they come; Ray starts an actor that died again.

    Args:
        answers (`ShardAnswers`): The work, which is sent to each actor.
        workers (`int`): Actors, each with one CPU.

    Raises:
        ValueError: Ray has fewer CPUs than workers.
        BrokenProcessPool: Ray itself failed, as where its head died.
        OSError: The work failed there, as where a checkpoint or an image folder is not on that machine.
    """
    import ray

    with cluster(workers):
        check_cpus("workers", workers)
        ray.data.DataContext.get_current().enable_progress_bars = False
        count = len(answers.shards)
        shards = ray.data.from_items([{"shard": shard} for shard in range(count)], override_num_blocks=count)
        rows = shards.map_batches(
            _Actor,
            fn_constructor_args=(answers,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        try:
            for row in rows.iter_rows():
                yield row["shard"], json.loads(row["rows"])
        except ray.exceptions.RayTaskError as error:
            raise OSError(f"a worker of Ray failed: {type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise BrokenProcessPool(str(error)) from error


class _Actor:
    """`ShardAnswers` in a process of Ray."""

    def __init__(self, answers: ShardAnswers) -> None:
        # what there is to say of opening the checkpoint, the first process has said
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        self.answers = answers

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.answers(batch)
