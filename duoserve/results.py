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
