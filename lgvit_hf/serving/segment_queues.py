"""`SegmentQueues`: which samples run next, through which blocks; by a clock that it is given. It runs nothing."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar

from .expected_work import Backlog, ExpectedWork, Prospects
from .run_costs import OVERHEAD_MS, RunCosts, Stretch

Owner = TypeVar("Owner")

# seconds after which a request counts as due, in the order of a queue; it expires by its deadline alone
MOST_TIME = 10.0
# a run that gains this share of what another does goes before it where it is deeper
ABOUT = 0.9
# a sample is old where it has waited for so many times what it takes alone through all blocks, or its deadline nears
PATIENCE = 8


@dataclass(eq=False)
class Sample(Generic[Owner]):
    """A sample on its way.

    Args:
        owner (`Owner`): The request that it is of.
        number (`int`): Which of that request's samples, from 0.
        asked (`float`): When it came, in seconds.
        deadline (`float`, *optional*): When nobody waits for it any more.
        state (`Any`, *optional*): Before its next block; only what runs the blocks knows what that is.
    """

    owner: Owner
    number: int
    asked: float
    deadline: float = math.inf
    state: Any = None
    since: float = field(init=False)  # when it came into the queue where it is
    waited: float = 0.0  # seconds, in the queues where it was

    def __post_init__(self) -> None:
        self.since = self.asked


# by when its request has had its turn, a number for each, by when it has had its own, whose it is, and a sample
_New = tuple[float, int, float, Hashable, Sample[Owner]]


@dataclass(frozen=True, eq=False)
class Run(Generic[Owner]):
    """Samples that run together through some blocks of a segment, from `start` to before `stop`.

    Args:
        segment (`int`), start (`int`), stop (`int`): Numbers from 0.
        samples (`list[Sample]`): At least one.
        fill (`float`): Their number as a share of what such a run may hold.
    """

    segment: int
    start: int
    stop: int
    samples: list[Sample[Owner]]
    fill: float


class SegmentQueues(Generic[Owner]):
    """Samples that wait, in a queue before each segment; and before a block, where a run ended within a segment.

    A run takes as many samples and blocks as gain most within `max_run_ms`, see `RunCosts.best`.

    - The first segment goes before the others, until it has had half of the time: what exits there is answered soon,
      however many go on.
    - Of the others the fullest goes first, and of those about as full the deepest: its samples are answered soonest,
      and those before can still be joined. Old samples do not wait for that. In a queue the first due go first.
    - Where nothing else waits, new samples wait for others only while some are coming, for at most `max_wait` and what
      one more sample in their run would save, and as long as their deadline allows.
    - Of those who wait for the first segment each client has a sample taken in turn, however many it has; of requests
      of one size the first is begun with all of its samples before the next.
    - Under more load than can be borne, what has begun ends in time: no request begins while a sample that has begun
      would be late for it, and those that would be late themselves come last; by how many exit where, see
      `ExpectedWork`, and as if whoever has more time made way.

    Args:
        costs (`RunCosts`): Of the blocks.
        max_samples (`int`, *optional*, defaults to 32): Of a run.
        max_run_ms (`float`, *optional*, defaults to 15.0): Of a run, but for one block of one sample.
        max_wait (`float`, *optional*, defaults to 0.002): Seconds.
        over (`Callable`, *optional*): Whether nobody waits any more for what a request asked.

    Example:

        >>> queues = SegmentQueues(RunCosts([1], [[[4.0]], [[9.0], [9.0]]]))
        >>> queues.add([Sample("a", 0, asked=0.0), Sample("a", 1, asked=0.0)])
        >>> run = queues.next(now=0.0)
        >>> run.segment, run.start, run.stop, [sample.number for sample in run.samples]
        (0, 0, 1, [0, 1])
        >>> queues.ran(run, run.samples[:1], seconds=0.008, now=0.008)  # the second exits
        >>> queues.add([Sample("b", 0, asked=0.008)])
        >>> run = queues.next(now=0.008)  # a new sample, before the other has its turn in the second segment
        >>> run.segment, [sample.owner for sample in run.samples]
        (0, ['b'])
    """

    def __init__(
        self,
        costs: RunCosts,
        *,
        max_samples: int = 32,
        max_run_ms: float = 15.0,
        max_wait: float = 0.002,
        over: Callable[[Owner], bool] = lambda owner: False,
    ):
        self.costs, self.max_samples, self.max_run_ms, self.max_wait = costs, max_samples, max_run_ms, max_wait
        # samples that were taken out because nobody waits for them; who runs the others empties it
        self.dropped: list[Sample[Owner]] = []
        self._over = over
        self._new: list[_New[Owner]] = []  # before the first block, sorted
        self._queues: list[list[list[Sample[Owner]]]] = [[[] for _ in range(blocks)] for blocks in costs.num_blocks]
        self._order = count()
        self._turn, self._turns = 0.0, dict[Hashable, float]()
        self._soonest = math.inf  # deadline of all that wait, or of one that has gone since
        self._lead_ms = 0.0  # that the first segment has had more than the others, since these began to wait
        self._patience = PATIENCE * costs.whole_ms(1) / 1e3
        # what a sample needs behind the run under way, where the first segment has half of the time
        self._margin = 2 * (costs.longest_run_ms(max_run_ms) + costs.whole_ms(1)) / 1e3
        self._work = ExpectedWork(costs, max_samples, max_run_ms)

    def __len__(self) -> int:
        return len(self._new) + sum(len(queue) for segment in self._queues for queue in segment)

    def add(self, samples: Sequence[Sample[Owner]], client: Hashable = None) -> None:
        """Let samples wait for the first segment.

        Args:
            samples (`Sequence[Sample]`): Of one request.
            client (`Hashable`, *optional*): Whose they are; by default each request is of a client of its own.
        """
        turn = self._turn if client is None else max(self._turn, self._turns.get(client, 0.0))
        # by when all of them have had their turn: a request is not begun long before it can be answered
        last = turn + len(samples)
        for number, sample in enumerate(samples, start=1):
            insort(self._new, (last, next(self._order), turn + number, client, sample))
        self._soonest = min(self._soonest, samples[0].deadline)
        if client is not None:
            self._turns = {other: until for other, until in self._turns.items() if until > self._turn}
            self._turns[client] = last

    def next(self, now: float, coming: bool = False) -> Run[Owner] | float:
        """What is to run now, or until when to wait if nothing else comes.

        Args:
            now (`float`): Seconds.
            coming (`bool`, *optional*, defaults to `False`): Whether samples are known to be added soon.
        """
        if now >= self._soonest:
            self.purge(now)
        while (place := self._choose(now, coming)) is not None:
            if isinstance(place, float):
                return place
            segment, start = place
            best = self._best(segment, start)
            if samples := self._take(segment, start, best.samples, now):
                stop = self.costs.longest(segment, start, len(samples), self.max_run_ms).stop
                most = self.costs.best(segment, start, self.max_samples, self.max_run_ms).samples
                return Run(segment, start, stop, samples, min(1.0, len(samples) / most))
        return math.inf

    def ran(
        self,
        run: Run[Owner],
        staying: Iterable[Sample[Owner]],
        seconds: float,
        now: float,
        failed: int = 0,
        had_error: bool = False,
    ) -> None:
        """Put the samples of a run that go on where they are now.

        Args:
            run (`Run`), staying (`Iterable[Sample]`), seconds (`float`), now (`float`): What ran, for how long.
            failed (`int`, *optional*, defaults to 0): Of the others, how many did not exit.
            had_error (`bool`, *optional*, defaults to `False`): Whether it says nothing of how long others will take.
        """
        staying = list(staying)
        if not had_error:
            expected_ms = self.costs.milliseconds(run.segment, run.start, run.stop, len(run.samples)) + OVERHEAD_MS
            self._work.took(expected_ms, 1e3 * seconds)
        segment, start = run.segment, run.stop
        if start == len(self._queues[segment]):
            self._work.saw(segment, len(run.samples) - failed, len(staying))
            segment, start = segment + 1, 0
        for sample in staying:
            sample.since = now
            self._queues[segment][start].append(sample)
            self._soonest = min(self._soonest, sample.deadline)
        self._lead_ms += 1e3 * seconds if run.segment == 0 else -1e3 * seconds
        deeper = any(queue for segment in self._queues[1:] for queue in segment)
        # a pause of the machine, or a run that failed, is no time that the first segment had
        most_ms = 2 * max(self.max_run_ms, self._work.longest_run_ms)
        self._lead_ms = min(max(0.0, self._lead_ms), most_ms) if deeper else 0.0

    def purge(self, now: float) -> None:
        """Take out all that nobody waits for."""
        self._new = [entry for entry in self._new if self._wanted_new(entry, now)]
        for segment in self._queues:
            for number, queue in enumerate(segment):
                segment[number] = [sample for sample in queue if self._wanted(sample, now)]
        self._soonest = min((sample.deadline for sample in self.samples()), default=math.inf)

    def samples(self) -> Iterator[Sample[Owner]]:
        """All that wait."""
        yield from (sample for *_, sample in self._new)
        yield from (sample for segment in self._queues for queue in segment for sample in queue)

    # -- decisions ---------------------------------------------------------------------------------------------

    def _choose(self, now: float, coming: bool) -> tuple[int, int] | float | None:
        """Before which block samples are to run, until when to wait, or nothing where none are."""
        first, deeper = self._next_place(now, range(1)), self._next_place(now, range(1, len(self._queues)))
        if first is None and self._new:
            first = (0, 0)
        if first is None:
            return deeper
        if deeper is None:
            until = self._until(now) if coming and first == (0, 0) else now
            return until if until > now else first
        if self._lead_ms < self.max_run_ms and (first != (0, 0) or self._may_begin(now)):
            return first
        return deeper

    def _next_place(self, now: float, segments: range) -> tuple[int, int] | None:
        """Where to go on: the deepest queue with old samples, else the deepest of those that gain about most."""
        places = [(number, start) for number in segments for start, queue in enumerate(self._queues[number]) if queue]
        old = [place for place in places if self._has_old(*place, now)]
        if old or not places:
            return max(old, default=None)
        gains = [self._best(*place).gain for place in places]
        return max(place for place, gain in zip(places, gains, strict=True) if gain >= ABOUT * max(gains))

    def _has_old(self, segment: int, start: int, now: float) -> bool:
        """Whether some sample has waited there for long, or can no longer wait; not one that will be late anyway."""
        patience, margin = self._work.pace * self._patience, self._work.pace * self._margin
        return any(
            now > min(sample.since + patience, sample.deadline - margin)
            and not self._is_late(sample, segment, start, now)
            for sample in self._queues[segment][start]
        )

    def _is_late(self, sample: Sample[Owner], segment: int, start: int, now: float) -> bool:
        """Whether it is expected to be late even if nothing else ran."""
        return now + self._work.alone_ms(segment, start) / 1e3 > sample.deadline

    def _may_begin(self, now: float) -> bool:
        """Whether some new request can begin in time, and what has begun end in time, or one has begun already."""
        prospects, before = self._prospects(now), None
        for entry in self._new:
            owner, is_next, before = entry[-1].owner, entry[-1].owner is not before, entry[-1].owner
            # a request's samples come one after the other: if its first is gone, it has begun
            if is_next and not self._over(owner) and (entry[-1].number > 0 or prospects.ends_in_time(*_asked(entry))):
                return True
        return False

    def _prospects(self, now: float) -> Prospects:
        return Prospects(self._work, self._backlog(now), now, min(len(self), self.max_samples))

    def _backlog(self, now: float) -> Backlog:
        """Of samples after the first block, but for those that will be late anyway."""
        if self._soonest == math.inf:
            return Backlog(())
        return Backlog(
            (sample.deadline, self._work.left_ms(segment, start))
            for segment, queues in enumerate(self._queues)
            for start, queue in enumerate(queues)
            for sample in queue
            if not self._is_late(sample, segment, start, now)
        )

    def _best(self, segment: int, start: int) -> Stretch:
        waiting = len(self._new) if (segment, start) == (0, 0) else len(self._queues[segment][start])
        return self.costs.best(segment, start, min(waiting, self.max_samples), self.max_run_ms)

    def _until(self, now: float) -> float:
        """Until when new samples may wait to be joined, where nothing else is to run."""
        saved_ms = self._saved_ms()
        if saved_ms <= 0:
            return now
        new = [sample for *_, sample in self._new]
        until = min(sample.since for sample in new) + min(self.max_wait, saved_ms / 1e3)
        return min(until, min(sample.deadline for sample in new) - self._work.pace * self._margin)

    def _saved_ms(self) -> float:
        """What one more sample in the next run of the first segment saves; 0 where none fits in."""
        waiting = len(self._new)
        best = self._best(0, 0)
        if best.samples < waiting or waiting >= self.max_samples:
            return 0.0
        alone, these, joined = (
            self.costs.milliseconds(0, 0, best.stop, samples) for samples in (1, waiting, waiting + 1)
        )
        return OVERHEAD_MS + alone + these - joined

    # -- queues ------------------------------------------------------------------------------------------------

    def _take(self, segment: int, start: int, most: int, now: float) -> list[Sample[Owner]]:
        """The next samples of a queue that somebody waits for; those that nobody waits for are taken out."""
        if (segment, start) == (0, 0):
            return self._take_new(most, now)
        taken: list[Sample[Owner]] = []
        queue, looked = self._queues[segment][start], 0
        queue = sorted(queue, key=lambda sample: (self._is_late(sample, segment, start, now), _due(sample)))
        while len(taken) < most and looked < len(queue):
            if self._wanted(queue[looked], now):
                taken.append(_leaving(queue[looked], now))
            looked += 1
        self._queues[segment][start] = queue[looked:]
        return taken

    def _take_new(self, most: int, now: float) -> list[Sample[Owner]]:
        """New samples; where all requests would be late those of one alone: they may still exit before the end."""
        prospects, looked = self._prospects(now), 0
        in_time: list[_New[Owner]] = []
        late: list[_New[Owner]] = []
        while len(in_time) < most and looked < len(self._new):
            entry = self._new[looked]
            looked += 1
            if not self._wanted_new(entry, now):
                continue
            sample = entry[-1]
            # a request's samples come one after the other, its first decides for all
            if sample.number == 0:
                is_late = not prospects.ends_in_time(*_asked(entry))
            else:
                is_late = bool(late) and late[-1][-1].owner is sample.owner
            if is_late:
                late.append(entry)
            else:
                in_time.append(entry)
                prospects.begins()
        taken, left = in_time, late
        if not in_time and late:
            begun = self._with_most_time(late)
            taken = begun[:most]
            # what is left of a request that has begun comes next
            left = [(-math.inf, *entry[1:]) for entry in begun[most:]]
            left += [entry for entry in late if entry[-1].owner is not begun[0][-1].owner]
        self._new = sorted(left + self._new[looked:])
        # who is late himself is no measure of whose turn it is
        reached = max((turn for _, _, turn, _, _ in taken), default=0.0)
        self._turn = max(self._turn, reached if in_time else min((turn for _, _, turn, _, _ in left), default=reached))
        return [_leaving(sample, now) for *_, sample in taken]

    def _with_most_time(self, late: list[_New[Owner]]) -> list[_New[Owner]]:
        """Of new samples those of the request that has most time beside what its samples take, of several the last."""
        share = self._work.left_ms(0, 0) / 1e3
        firsts = [entry for entry in reversed(late) if entry[-1].number == 0]
        owner = max(firsts, key=lambda first: first[-1].deadline - _asked(first)[0] * share)[-1].owner
        return [entry for entry in late if entry[-1].owner is owner]

    def _wanted_new(self, entry: _New[Owner], now: float) -> bool:
        """As `_wanted`; what is taken out has not had its turn."""
        *_, client, sample = entry
        wanted = self._wanted(sample, now)
        if not wanted and client in self._turns:
            self._turns[client] -= 1
        return wanted

    def _wanted(self, sample: Sample[Owner], now: float) -> bool:
        wanted = now < sample.deadline and not self._over(sample.owner)
        if not wanted:
            self.dropped.append(sample)
        return wanted


def _asked(first: _New[Owner]) -> tuple[int, float]:
    """Of the first sample of a request that waits: how many it has, and their deadline."""
    last, _, turn, _, sample = first
    return round(last - turn) + 1, sample.deadline


def _due(sample: Sample[Owner]) -> float:
    return min(sample.deadline, sample.asked + MOST_TIME)


def _leaving(sample: Sample[Owner], now: float) -> Sample[Owner]:
    sample.waited += now - sample.since
    return sample
