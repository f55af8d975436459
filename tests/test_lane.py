"""CudaLane's order of waits, on a model of CUDA's streams and events that needs no GPU."""

import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duoserve import link
from duoserve.cache import LAUNCHED, GPUExpertCache
from duoserve.link import CudaLane, Mailbox

CHUNKS = 4
NOTHING = (None,) * CHUNKS


class Device:
    """Streams run their operations in order, and no stream waits for another unless it is told to: which of
    them goes on is decided by chance, whenever the host asks, and at the end."""

    def __init__(self, seed, slots):
        self.random, self.streams, self.memory = random.Random(seed), [], [NOTHING] * slots
        self.compute = self.current = Stream(self)
        self.seen = []                      # (what should have been in a slot, what was)
        self.lazy = [self.random.choice((0.02, 1, 1)) for _ in range(4)]     # a stream may be far behind

    def step(self) -> bool:
        """One operation of some stream that can go on; False if there is none."""
        ready = [s for s in self.streams if s.operations and s.operations[0][0]()]
        if ready:
            weights = [self.lazy[self.streams.index(s)] for s in ready]
            self.random.choices(ready, weights)[0].operations.pop(0)[1]()
        return bool(ready)

    def run(self):
        while self.step():
            pass
        assert not any(s.operations for s in self.streams), "a stream waits for what never comes"

    def read(self, slot, key):
        """The compute stream reads a slot for as long as two operations."""
        for _ in range(2):
            self.compute.add(lambda: self.seen.append(((key,) * CHUNKS, self.memory[slot])))

    def write(self, stream, slot, chunk, key):
        def write():
            self.memory[slot] = (*self.memory[slot][:chunk], key, *self.memory[slot][chunk + 1:])
        stream.add(write)


class Stream:
    cuda_stream = 0

    def __init__(self, device):
        self.device, self.operations = device, []
        device.streams.append(self)

    def add(self, run, ready=lambda: True):
        self.operations.append((ready, run))

    def wait_event(self, event):
        record = event.last                 # CUDA takes an event that was never recorded as done
        self.add(lambda: None, lambda: record is None or record[0])

    def record_event(self):
        event = Event(self.device)
        event.record(self)
        return event

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def query(self):
        return not self.operations

    def synchronize(self):
        while self.operations and self.device.step():
            pass


class Event:
    def __init__(self, device):
        self.device, self.last = device, None

    def record(self, stream=None):
        self.last = record = [False]
        (stream or self.device.current).add(lambda: record.__setitem__(0, True))

    def query(self):
        for _ in range(self.device.random.randrange(4)):
            self.device.step()
        return self.last is None or self.last[0]

    def synchronize(self):
        while not self.last[0]:
            assert self.device.step()

    def elapsed_time(self, other):
        return 1.0


class Mail:
    """What the compute stream leaves for the host."""

    device, numbers = True, ()

    def __init__(self, device):
        self.written = Event(device)
        self.written.record(device.compute)
        self.full = self.written.query


class Late(np.ndarray):
    """Words of which the first that is not written is written as soon as it has been found."""

    def argmax(self):
        i = int(super().argmax())
        self[min(i, 39)] = 0
        return i


@pytest.fixture
def cuda(monkeypatch):
    """A function that puts a new model in place of torch.cuda's streams and events."""
    def install(seed, slots):
        device = Device(seed, slots)

        @contextmanager
        def stream(s):
            device.current, before = s, device.current
            yield
            device.current = before

        monkeypatch.setattr(link, "cuda_runtimes", lambda: [SimpleNamespace(cudaMemcpyAsync=None)])
        for name, stand_in in {"Stream": lambda _=None: Stream(device), "stream": stream,
                               "Event": lambda enable_timing=False: Event(device),
                               "current_stream": lambda _=None: device.current,
                               "synchronize": lambda _=None: device.run()}.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return device
    return install


class Eldest:
    known = {(layer, e) for layer in range(2) for e in range(4)}

    def victim(self, key, candidates, urgent):
        return candidates[0]


def wrong_reads(cuda, seed, spoil=lambda lane, cache: None) -> int:
    """Random demands and guesses through cache and lane; how many reads of a slot found something else there.

    Sometimes the device is told of a layer's experts before the host knows which are wanted, and of several
    layers before any is known; it computes with those that are there, wanted or not. Sometimes that is
    interrupted.
    """
    slots, rng, table, fetched = 5, random.Random(seed), {}, []
    device = cuda(seed, slots)
    lane = CudaLane(torch.empty(slots, CHUNKS), (1, 1), device)

    def copy(transfer, start, stop):
        for chunk in range(start, stop):
            device.write(lane.stream, transfer.slot, chunk, transfer.key)
    lane.copy = copy
    cache = GPUExpertCache(slots, CHUNKS, lane)
    spoil(lane, cache)
    cache.serve(Eldest())
    keys = [(layer, e) for layer in range(2) for e in range(4)]
    for _ in range(25):
        ahead, interrupted = rng.choice(((), (0,), (1,), (0, 1))), False
        for layer in ahead:
            table[layer] = cache.launch(layer, 4)
            fetched.append(Mail(device))    # (the router is before its experts)
            for e, slot in enumerate(table[layer]):
                if slot != LAUNCHED:
                    device.read(slot, (layer, e))
            if interrupted := not rng.randrange(10):
                cache.abandon()
                fetched.clear()
                cache.demand(rng.choice(keys))
                break
            fetched[-1] = lane.fetch((), fetched[-1])
            lane.used([slot for slot in table[layer] if slot != LAUNCHED])
            for _ in range(rng.randrange(3)):
                cache.pump()
        for layer in () if interrupted else ahead or (rng.randrange(2),):
            if ahead or rng.randrange(2):
                lane.read(fetched.pop(0) if ahead else lane.fetch((), Mail(device)))
            wanted = rng.sample([key for key in keys if key[0] == layer], 1 + (len(ahead) < 2))
            cache.require(wanted)
            for key in wanted:
                assert cache.demand(key)
                slot = cache.acquire(key)
                if slot != LAUNCHED:
                    device.read(slot, key)
                cache.release(key)
            cache.plan(rng.sample(keys, 2))
            for _ in range(rng.randrange(12)):
                cache.pump()
                if not rng.randrange(3):
                    lane.look()             # (and gives its events to be used again)
    device.run()
    lane.finish()
    assert lane.busy > 0 and not lane.flying and not lane.landed
    return sum(want != got for want, got in device.seen)


def no_wait_for_a_load(lane, cache):
    lane.wait = lambda transfer: None


def no_mark_of_the_last_use(lane, cache):
    used = lane.used
    lane.used = lambda slots: used(slots) if len(slots) != 1 else None


def no_mark_of_a_launch(lane, cache):
    used, release = lane.used, cache.release
    lane.used = lambda slots: None

    def marked(key):
        lane.used = used
        release(key)
        lane.used = lambda slots: None
    cache.release = marked


def a_use_that_is_over_too_early(lane, cache):
    used = lane.used

    def hasty(slots):
        lane.fetches -= 1
        used(slots)
        lane.fetches += 1
    lane.used = hasty


def no_wait_for_a_use(lane, cache):
    lane.used = lambda slots: None


def launched_before_it_has_arrived(lane, cache):
    arrived, launch = lane.arrived, cache.launch

    def hasty(layer, experts):
        lane.arrived = lambda transfer: True
        row = launch(layer, experts)
        lane.arrived = arrived
        return row
    cache.launch = hasty


def no_wait_after_an_interruption(lane, cache):
    lane.abandon = lambda: None


def loaded_after_the_first_chunk(lane, cache):
    send, first = lane.send, {}

    def hasty(transfer, nbytes):
        send(transfer, nbytes)
        first.setdefault(transfer, lane.flying[-1][1])
        if transfer.loaded:
            transfer.loaded = first[transfer]
    lane.send = hasty


def the_last_chunk_withheld(lane, cache):
    copy = lane.copy
    lane.copy = lambda transfer, start, stop: copy(transfer, start, min(stop, CHUNKS - 1))


def arrived_before_the_last_chunk(lane, cache):
    poll = lane.poll

    def hasty():
        poll()
        for _, _, transfer, _ in lane.flying:
            transfer.arrived = True
    lane.poll = hasty


def test_a_mailbox_is_full_when_each_of_its_words_is_written():
    mail, rng = Mailbox(40, torch.device("cpu")), random.Random(0)
    assert mail.full()
    for _ in range(2):
        mail.clear()
        for word in rng.sample(range(40), 40):
            assert not mail.full()
            mail.device[word] = rng.choice((0.0, -1.5, torch.nan, torch.inf))
        assert mail.full()
    mail.clear()
    mail.words = mail.words.view(Late)
    for _ in range(40):
        assert not mail.full()
    assert mail.full()
    mail.words = np.asarray(mail.words)
    for nan in torch.tensor(torch.nan), torch.tensor(0x7FFF, dtype=torch.int16):
        mail.clear()
        mail.device.view(nan.dtype).copy_(nan)
        assert mail.full()


def test_every_read_of_a_slot_finds_its_expert(cuda):
    assert not any(wrong_reads(cuda, seed) for seed in range(200))


@pytest.mark.parametrize("spoil", (no_wait_for_a_load, no_mark_of_the_last_use, no_mark_of_a_launch,
                                   a_use_that_is_over_too_early, no_wait_for_a_use,
                                   launched_before_it_has_arrived, no_wait_after_an_interruption,
                                   loaded_after_the_first_chunk, the_last_chunk_withheld,
                                   arrived_before_the_last_chunk))
def test_each_wait_matters(spoil, cuda):
    assert any(wrong_reads(cuda, seed, spoil) for seed in range(200))
