"""GPUExpertCache: a few slots on the device, who is in them, who is on the way, who may be evicted.

Pure bookkeeping on plain ints: it moves bytes only by telling the lane to. A scheduler asks for experts in
two ways, `demand` (needed now: sent at once) and `plan` (guesses in order of priority: sent in chunks
as the lane has room), and answers one question, `victim`: which slot to give up for a newcomer.
"""

from contextlib import suppress
from dataclasses import dataclass

from .errors import UserError
from .link import Key, LinkError, Transfer

# In place of a slot: the device has found the expert by itself; the host computes it.
LAUNCHED, HOST = -1, -2
# What the host does of an expert: some of the BLOCKS, equal in rows, of its first matrix; or the WHOLE.
BLOCKS, WHOLE = 4, 5


@dataclass(slots=True, eq=False)
class Slot:
    """One expert's place. `transfer` is what filled or is filling it; a dropped load leaves the slot
    empty."""

    index: int
    key: Key | None = None
    transfer: Transfer | None = None
    pinned: bool = False

    @property
    def whole(self) -> bool:
        return self.transfer is not None and self.transfer.sent == self.transfer.size


@dataclass
class Counts:
    """What happened since `serve`: every access is a hit, a used prefetch, a miss, or the host's."""

    hits: int = 0
    misses: int = 0
    prefetched: int = 0                     # guesses whose first chunk moved
    prefetched_used: int = 0
    host_experts: int = 0
    split: int = 0                          # of misses and used prefetches: the host computed a part of it
    in_time: int = 0                        # of hits and used prefetches: was there when it was routed to
    wasted: float = 0.0                     # guesses evicted or dropped before a use, in experts' bytes
    bytes_moved: int = 0


class GPUExpertCache:
    """N slots of `expert_bytes` each, filled by `lane`; `scheduler.victim(key, candidates, urgent)` chooses
    who goes."""

    def __init__(self, slots: int, expert_bytes: int, lane):
        self.slots = [Slot(i) for i in range(slots)]
        self.expert_bytes, self.lane = expert_bytes, lane
        self.slot_of: dict[Key, Slot] = {}
        self.queue: list[Transfer] = []     # guesses not fully sent, in order of priority
        # Not to be evicted: what the router asked for and is not yet computed; and what the device may be
        # computing by itself, of a layer that is enqueued and whose routing the host has not read.
        self.needed: set[Key] = set()
        self.launched: set[Key] = set()
        self.experts = 0                    # of a layer, as `launch` is told
        self.scheduler, self.host = None, None
        self.blocked: Transfer | None = None                        # a guess that found no slot to take
        self.sent = 0                       # transfers that were ready to be computed with so far
        self.counts = Counts()
        self.log: list[Transfer] | None = None                      # what moved, for the timeline
        lane.fed_by(self.pump)

    def serve(self, scheduler, host=None) -> Counts:
        """Another phase, or another request: what is here already is there for free, and counting starts
        again, in what is returned. A `host` may compute what is missing."""
        self.scheduler, self.host, self.counts = scheduler, host, Counts()
        self.since = self.lane.now()
        for slot in self.slot_of.values():
            slot.transfer.counted = True
        for transfer in self.queue:         # what has not begun is this phase's
            if transfer.slot < 0:
                transfer.asked = self.since
        return self.counts

    def transfer_s(self) -> float:
        """Seconds of the link that an expert takes."""
        return self.lane.seconds_of(self.expert_bytes)

    def missing_s(self, key: Key) -> float:
        """Seconds of the link that the rest of an expert takes."""
        slot = self.slot_of.get(key)
        return self.lane.seconds_of(self.expert_bytes - (slot.transfer.sent if slot else 0))

    def ready(self, key: Key) -> bool:
        """All of it is here or enqueued, but for what the host makes unnecessary."""
        slot = self.slot_of.get(key)
        return slot is not None and not slot.transfer.missing

    def link_use(self) -> float:
        """The share of the time since `serve` that the link takes for what was used: with 1 it has none to
        spare (which is also what is said before anything was used)."""
        used = max(0.0, self.counts.misses + self.counts.prefetched_used - self.counts.split / 2)
        return used * self.transfer_s() / max(self.lane.now() - self.since, 1e-9) if used else 1.0

    def resident(self, key: Key) -> bool:
        """All of it is here or enqueued."""
        slot = self.slot_of.get(key)
        return slot is not None and slot.whole

    def launch(self, layer: int, experts: int) -> list[int]:
        """A layer is about to be enqueued, its routing unknown: the slots of its experts, LAUNCHED for what
        is not there."""
        row, self.experts = [LAUNCHED] * experts, experts
        for e in range(experts):
            slot = self.slot_of.get((layer, e))
            if slot is not None and slot.whole and self.lane.arrived(slot.transfer):
                self.launched.add(slot.key)
                row[e] = slot.index
        return row

    def enqueued(self, layer: int) -> bool:
        """Is this layer enqueued already, with some of its experts?"""
        return any(key[0] == layer for key in self.launched)

    def require(self, keys: list[Key], on_host: list[Key] = []) -> None:
        """The router asks for these of a layer: none may be evicted before it is computed. Those `on_host`
        the host computes: what has begun to move of them stops."""
        for guess in [transfer for transfer in self.queue if transfer.key in on_host]:
            self.queue.remove(guess)
            self.drop(guess.key)
        self.counts.host_experts += len(on_host)
        self.needed.update(keys)
        if self.launched:
            layer = (keys or on_host)[0][0]
            self.launched -= {(layer, e) for e in range(self.experts)} - self.needed
        for key in filter(self.resident, keys):
            transfer = self.slot_of[key].transfer
            transfer.in_time = self.lane.arrived(transfer)

    def plan(self, keys: list[Key]) -> None:
        """Replace the guesses by these, best first. One no longer wanted stops at its chunk's end."""
        keys = dict.fromkeys(keys)
        if unknown := [key for key in keys if key not in self.scheduler.known]:
            raise UserError(f"policy {type(self.scheduler).__name__}: it plans {unknown[0]!r}, which is no "
                            "(layer, expert) of this model")
        waiting = {transfer.key: transfer for transfer in self.queue}
        self.queue = [waiting.pop(key, None) or Transfer(key, self.expert_bytes, self.lane.now())
                      for key in keys if key in waiting or key not in self.slot_of]
        for key in waiting:
            self.drop(key)
        self.reconsider()
        self.pump()

    def pump(self) -> None:
        """Send the chunks of guesses that are due."""
        self.lane.poll()
        while self.queue and self.lane.room(self.queue[0].asked):
            transfer = self.queue[0]
            if transfer.slot < 0 and (transfer is self.blocked or not self._take(transfer)):
                # No slot is worth less: it waits until one is, or the plan changes. What has begun goes on.
                self.blocked, transfer.held = transfer, True
                transfer = next((begun for begun in self.queue if begun.slot >= 0), None)
                if transfer is None:
                    break
            elif transfer.held:
                transfer.held, transfer.asked = False, self.lane.now()
            try:
                chunk = self.lane.chunks[self.host is None]
                self._send(transfer, min(chunk, transfer.size - transfer.sent))
            except LinkError:
                self.drop(transfer.key)     # if the router wants it, it will be demanded
            if transfer.sent == transfer.size:
                self.queue.remove(transfer)

    def reconsider(self) -> None:
        """Something has changed for which a guess that found no slot may find one now."""
        self.blocked = None

    def demand(self, key: Key, skip: int = 0) -> bool:
        """Have all of an expert but its first `skip` bytes enqueued now, at the head of the lane; False if no
        slot can be freed for it yet."""
        if self.ready(key):
            return True
        slot = self.slot_of.get(key)
        begun = slot is not None
        guess = slot.transfer if begun else next((t for t in self.queue if t.key == key), None)
        transfer = guess or Transfer(key, self.expert_bytes, self.lane.now())
        if not begun and not self._take(transfer, urgent=True):
            return False
        if transfer in self.queue:
            self.queue.remove(transfer)
        transfer.asked, transfer.skip = self.lane.now(), skip
        if transfer.used:                   # ... by a layer visit that the host helped: this is another
            transfer.used = transfer.counted = transfer.predicted = False
        try:
            if transfer.missing:
                self._send(transfer, transfer.missing)
            else:
                self._ready(transfer)       # (the host does what has not been sent of a guess)
        except LinkError:
            self.drop(key)
            if not begun:
                raise
            return self.demand(key, skip)   # a prefetch that fails is tried again as a demand
        return True

    def read(self, fetched):
        """The lane's `read`, beside the host."""
        return self.lane.read(fetched) if self.host is None else self.lane.read(fetched, self.host.pause)

    def acquire(self, key: Key) -> int:
        """Wait for an expert, pin it, and return its slot; or LAUNCHED, if the device computes it anyway."""
        slot = self.slot_of[key]
        launched, transfer = key in self.launched, slot.transfer
        if not launched:
            self.lane.wait(transfer)
        slot.pinned = True
        kind = "hits" if transfer.counted else "prefetched_used" if transfer.predicted else "misses"
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        self.counts.in_time += transfer.in_time
        transfer.counted, transfer.used, transfer.in_time = True, True, False
        return LAUNCHED if launched else slot.index

    def release(self, key: Key) -> None:
        """The expert has been computed (or its computation enqueued): its slot may be taken."""
        slot = self.slot_of[key]
        slot.pinned = False
        self.needed.discard(key)
        if not slot.whole:                  # the host helped; the rest follows if nothing is worth more
            self.counts.split += 1
            slot.transfer.skip, slot.transfer.asked = 0, self.lane.now()
            self.queue.append(slot.transfer)
        if key in self.launched:
            self.launched.discard(key)
        else:
            self.lane.used([slot.index])
        self.reconsider()

    def drop(self, key: Key) -> None:
        """Empty an expert's slot, if it has one, unless it is pinned; what was on its way there stops."""
        slot = self.slot_of.get(key)
        if slot is not None and not slot.pinned:
            self._evict(slot)

    def fill(self, keys: list[Key]) -> None:
        """Between requests: these experts and no others, as many as there are slots, all of them there."""
        wanted = keys[:len(self.slots)]
        for key in self.slot_of.keys() - set(wanted):
            self.drop(key)
        for key in wanted:                  # (what is here already is not moved again)
            with suppress(LinkError):       # (it is said when somebody needs it)
                self.demand(key)
        self.lane.finish()

    def empty(self) -> None:
        """Every slot that is not pinned."""
        for key in list(self.slot_of):
            self.drop(key)

    def abandon(self) -> None:
        """After a failure or an interruption, wherever it came: no request, no pin; what is loaded stays."""
        self.queue.clear()
        self.needed.clear()
        self.launched.clear()
        self.lane.abandon()
        if self.host is not None:
            self.host.abandon()
        for slot in self.slots:
            slot.pinned = False
            if not slot.whole or self.slot_of.get(slot.key) is not slot:
                slot.key, slot.transfer = None, None
        self.slot_of = {slot.key: slot for slot in self.slots if slot.key is not None}

    def _send(self, transfer: Transfer, nbytes: int) -> None:
        self.lane.send(transfer, nbytes)
        if transfer.sent == nbytes:         # its first
            self.counts.prefetched += transfer.predicted
            if self.log is not None:
                self.log.append(transfer)
        self.counts.bytes_moved += nbytes
        if not transfer.missing:
            self._ready(transfer)

    def _ready(self, transfer: Transfer) -> None:
        self.sent += 1
        transfer.order = self.sent
        self.reconsider()

    def _take(self, transfer: Transfer, urgent: bool = False) -> bool:
        """Give a transfer its slot, now that its first chunk is due."""
        if len(self.slot_of) < len(self.slots):                     # (no empty one: interrupted half-way)
            slot = next((slot for slot in self.slots if slot.key is None), None)
        else:                               # a guess takes no slot that is being filled and was not used yet
            barred = set(map(self.slot_of.get, self.needed | self.launched))
            if not urgent:
                barred.update(self.slots[begun.slot] for begun in self.queue
                              if begun.slot >= 0 and not begun.used)
            candidates = [slot for slot in self.slots if slot not in barred and not slot.pinned]
            slot = self.scheduler.victim(transfer.key, candidates, urgent) if candidates else None
            if slot is not None and slot not in candidates:
                raise UserError(f"policy {type(self.scheduler).__name__}: its `victim` must return one of "
                                "the candidates or None")
        if slot is None:
            return False
        if slot.key is not None:
            self._evict(slot)
        transfer.predicted = not urgent
        slot.key, slot.transfer, transfer.slot = transfer.key, transfer, slot.index
        self.slot_of[transfer.key] = slot
        return True

    def _evict(self, slot: Slot) -> None:
        if slot.transfer in self.queue:
            self.queue.remove(slot.transfer)
        if slot.transfer.predicted and not slot.transfer.counted:
            self.counts.wasted += slot.transfer.sent / self.expert_bytes
        del self.slot_of[slot.key]
        slot.key, slot.transfer = None, None
        self.reconsider()
