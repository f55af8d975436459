"""What a request gives: its text, and its numbers."""

from dataclasses import asdict, dataclass


@dataclass
class Stats:
    """One request's numbers. Seconds and bytes; the accesses are those of decode (`cache.Counts`)."""

    load_s: float
    ttft_s: float | None                    # None if interrupted before
    tpot_s: float | None                    # None for a single token
    policy: str
    cache_experts: int
    hits: int
    misses: int
    prefetched: int
    prefetched_used: int
    in_time: int                            # of hits and used prefetches: was there when routed to
    bytes_moved: int
    peak_device_bytes: int
    link_busy_fraction: float
    host_experts: int                       # accesses computed on the host: neither hits nor misses
    split_experts: int                      # misses and used prefetches that it computed a part of
    host_busy_fraction: float
    host_unused: str | None                 # why it computed nothing, where it might have been expected to
    bytes_from_disk: int                    # of those moved (with --host-memory)
    prompt_tokens_kept: int                 # not prefilled: their keys and values were there


@dataclass
class Generation:
    """What a request gave: `token_ids` are the new tokens only, without the EOS; `finish_reason` is 'stop'
    (EOS), 'length' or 'interrupted'."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    stats: Stats

    def asdict(self) -> dict:
        return asdict(self) | {"new_tokens": len(self.token_ids)}


def result_of(engine, s) -> Generation:
    """What has come of an engine's `Sequence` so far."""
    d, elapsed = s.decode, max((s.last or s.first or s.arrived) - s.arrived, 1e-9)
    return Generation(s.text, s.new, len(s.prompt), s.finish_reason, Stats(
        load_s=engine.load_s, ttft_s=s.first and s.first - s.arrived,
        tpot_s=(s.last - s.first) / (len(s.new) - 1) if len(s.new) > 1 else None,
        policy=engine.policy, cache_experts=engine.plan.slots, hits=d.hits, misses=d.misses,
        prefetched=d.prefetched, prefetched_used=d.prefetched_used, in_time=d.in_time,
        bytes_moved=s.prefill.bytes_moved + d.bytes_moved, peak_device_bytes=engine.peak_bytes(),
        link_busy_fraction=min(1.0, engine.cache.lane.busy / elapsed),
        host_experts=d.host_experts, split_experts=d.split,
        host_busy_fraction=min(1.0, engine.host.busy / elapsed) if engine.host else 0.0,
        host_unused=None if d.host_experts or d.split else engine.host_unused,
        bytes_from_disk=engine.store.bytes_read - s.bytes_read, prompt_tokens_kept=s.kept))
