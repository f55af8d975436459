"""The lanes of a run: what the device computed, what crossed the link meanwhile, what the host computed, and
which waited for which.

`watch` has the engine keep its transfers and the spans of its computation; `save` writes them down: all of
them as JSON in Chrome's trace format (ui.perfetto.dev opens it), or a picture of the prefill and of the last
tokens as SVG. `trace` and `picture` need no engine.
"""

import json
import math
import os
from collections import defaultdict, deque
from pathlib import Path

from .errors import UserError
from .files import atomic
from .link import Transfer

COMPUTE, LINK, HOST = 1, 2, 3               # the lanes, as a trace numbers them
GAP = 50                                    # microseconds; pieces of a transfer this near are drawn as one
BLOCKS = 160                                # most in one panel of a picture, to be told apart
TITLE = "What is computed, and what crosses the link meanwhile (3.5 is expert 5 of layer 3)"
WIDTH, LEFT, RIGHT, ROW = 960, 66, 948, 30  # its pixels
COLOURS = {"attention": "#56b4e9", "expert": "#0072b2", "waiting for link": "#fbd5ce",
           "prefill transfer": "#dba11c", "demand transfer": "#d55e00", "prefetch": "#2a9d74",
           "wasted transfer": "url(#waste)", "on-host": "#8e5ea2", "idle": "#eee"}


def event(lane: int, start: float, end: float, kind: str, *place: int, **more) -> dict:
    """A block of a lane; `place` is a layer, or a layer and an expert of it."""
    args = {"kind": kind} | dict(zip(("layer", "expert"), place)) | more
    return {"ph": "X", "pid": 1, "tid": lane, "name": f"{kind} {'.'.join(map(str, place))}", "ts": start,
            "dur": round(end - start, 3), "args": args}


def trace(transfers: list[Transfer], computed: list[tuple[str, int, float, float]], chunk: int, kept=(),
          decode: float = math.inf, hosted=()) -> dict:
    """Chrome's trace of `transfers`, sent in `chunk`s, of what was `computed`: (name, layer, start, end), and
    of what was `hosted`: ((layer, expert), start, end).

    A transfer's kind is prefill if it was asked for before `decode` began, else prefetch or demand. It was
    used, or wasted (dropped or evicted before a use), or is one of the `kept`, whose experts are still in
    their slots.
    """
    spans = sorted(((*span, i, t) for t in transfers for i, span in enumerate(t.spans)), key=lambda s: s[:2])
    origin = min([start for _, _, start, _ in computed[:1]] + [start for start, *_ in spans[:1]], default=0.0)
    micro, free, last = lambda seconds: round(1e6 * (seconds - origin), 3), 0.0, None
    names = [("process", 0, "duoserve"), ("thread", COMPUTE, "compute"), ("thread", LINK, "link")]
    names += [("thread", HOST, "host")] * bool(hosted)
    events = [{"ph": "M", "pid": 1, "tid": lane, "name": f"{kind}_name", "args": {"name": name}}
              for kind, lane, name in names]
    for name, layer, start, end in computed:
        kind, *expert = name.split()
        events.append(event(COMPUTE, micro(start), micro(end), kind, layer, *map(int, expert)))
    for key, start, end in hosted:
        events.append(event(HOST, micro(start), micro(end), "on-host", *key))
    for start, end, i, t in spans:
        start, end = max(free, micro(start)), max(free, micro(end))         # CUDA's times are rounded
        nbytes = chunk if i + 1 < len(t.spans) else t.sent - i * chunk      # the last may be shorter
        if t is last and start - free <= GAP:
            events[-1]["dur"] = round(end - events[-1]["ts"], 3)
            events[-1]["args"]["bytes"] += nbytes
        else:
            kind = "prefill" if t.asked < decode else "prefetch" if t.predicted else "demand"
            use = "used" if t.used else "kept" if t in kept else "wasted"
            events.append(event(LINK, start, end, kind, *t.key, use=use, bytes=nbytes))
        free, last = end, t
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def picture(events: list[dict]) -> str:
    """An SVG of a trace's events: a panel for the prefill and one for the last three tokens, if they fit."""
    lanes, arrivals = {COMPUTE: [], LINK: [], HOST: []}, defaultdict(deque)
    uses, visits, before = [], [], math.inf
    for e in (e for e in events if e["ph"] == "X"):                 # (the first are names)
        args, end = e["args"], e["ts"] + e["dur"]
        lanes[e["tid"]].append((e["ts"], end, e["name"], args))
        if args.get("use") == "used":
            arrivals[args["layer"], args["expert"]].append(end)
    for start, end, _, args in list(lanes[COMPUTE]):
        arrived, due = -math.inf, arrivals[args["layer"], args.get("expert")]
        while due and due[0] <= start + GAP:
            arrived = due.popleft()
        uses.append((arrived, start))
        if before < arrived:
            lanes[COMPUTE].append((before, min(arrived, start), "", {"kind": "waiting for link"}))
        if args["kind"] == "attention":
            visits.append((start, args["layer"]))
        before = end
    bounds = [start for start, _ in visits] + [before]
    steps = [i for i, (_, layer) in enumerate(visits) if layer == 0] + [len(visits)]
    n, y, svg = len(steps) - 1, 56, []
    for title, first, after in (("Prefill, all tokens at once", 0, 1),
                                ("Decode, token after token", max(1, n - 3), n)):
        if first < n:
            i, j = steps[first], steps[after]
            blocks = lambda j: sum(bounds[i] <= b[0] < bounds[j] for lane in lanes.values() for b in lane)
            while j > i + 1 and blocks(j) > BLOCKS:
                j -= 1
            tokens = sum(i <= step < j for step in steps)
            what = f"{j - i} layer visits, {tokens} token{'s' * (tokens > 1)}" if first else f"{j - i} layers"
            svg += panel(f"{title}: {what}", bounds[i], bounds[j], lanes, uses, y)
            y += 224 if lanes[HOST] else 172
    drawn = "".join(svg)
    shown = [(name, colour) for name, colour in COLOURS.items() if f'fill="{colour}"' in drawn]
    for i, (name, colour) in enumerate(shown):
        svg += [box(12 + 118 * i, 35, 14, 11, colour), text(31 + 118 * i, 45, name)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif">',
        '<pattern id="waste" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0H5V5H0" fill="#ddd"/>'
        '<path d="M0 0H2V5H0" fill="#777"/></pattern>',
        box(0, 0, WIDTH, y, "#fff"), text(12, 22, TITLE, 14), *svg, "</svg>\n"])


def panel(title: str, begin: float, end: float, lanes: dict, uses: list[tuple[float, float]],
          y: int) -> list[str]:
    """The lanes from `begin` to `end`; `y` is its top."""
    span, top, low, free, svg = max(end - begin, 1.0), y + 46, y + 98, 0.0, []
    rows = [(COMPUTE, "compute", top), (LINK, "link", low)] + [(HOST, "host", low + 52)] * bool(lanes[HOST])
    share = [0.0] * 4                       # of the time: computing, waiting, the link and the host at work
    at = lambda t: LEFT + (RIGHT - LEFT) * (min(max(t, begin), end) - begin) / span
    for lane, name, row in rows:
        svg += [text(12, row + 19, name), box(LEFT, row, RIGHT - LEFT, ROW, COLOURS["idle"])]
        for start, stop, name, args in (b for b in lanes[lane] if b[1] >= begin and b[0] < end):
            x, width, kind = at(start), at(stop) - at(start), args["kind"]
            share[lane if lane != COMPUTE else not name] += width / (RIGHT - LEFT)
            if args.get("use") == "wasted":
                kind = "wasted"
            colour = COLOURS.get(kind) or COLOURS[f"{kind} transfer"]
            svg.append(box(x, row, max(width, 0.8), ROW, colour, name))
            if kind == "attention" and free <= x < RIGHT - 40:
                free = x + 48
                svg += [box(x, y + 30, 1, 16, "#777"), text(x + 4, y + 40, f"layer {args['layer']}", 10)]
            elif "expert" in args:
                label = name.split()[1]
                size = min(10, int((width - 3) / (0.6 * len(label))))       # as large as fits
                if size >= 7:
                    svg.append(text(x + 2, row + 19, label, size, "#222" if kind == "wasted" else "#fff"))
    lines = [f"M{at(arrived):.1f} {low}L{at(start):.1f} {top + ROW}" for arrived, start in uses
             if begin <= arrived and start < end]
    svg += [f'<path d="{line}" stroke="#777" stroke-width=".7"/>' for line in lines]
    step = 10.0 ** math.floor(math.log10(span / 5))         # a round number of microseconds, for a few ticks
    step *= 5 if span >= step * 25 else 2 if span >= step * 10 else 1
    for i in range(int(span / step) + 1):
        x, ms = at(begin + i * step), i * step / 1e3
        bottom = rows[-1][2] + ROW
        svg += [box(x, bottom, 1, 4, "#777"), text(x, bottom + 15, f"{ms:g}" if ms else "0 ms")]
    caption = "computing {:.0%} of the time, waiting for the link {:.0%}; the link at work {:.0%}"
    caption += ", the host {:.0%}" if lanes[HOST] else ""
    caption = caption.format(*share)
    return svg + [text(12, y + 20, title, 13), text(RIGHT, y + 20, caption, anchor="end")]


def box(x: float, y: float, width: float, height: float, colour: str, tip: str = "") -> str:
    shape = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect {shape} fill="{colour}" stroke="#fff" stroke-width=".4"><title>{tip}</title></rect>'


def text(x: float, y: float, words: str, size: int = 11, colour: str = "#222", anchor: str = "start") -> str:
    shape = f'x="{x:.1f}" y="{y}" font-size="{size}"'
    return f'<text {shape} fill="{colour}" text-anchor="{anchor}">{words}</text>'


def check(path: Path) -> None:
    """Before a run: can its timeline be written there?"""
    if path.suffix not in (".json", ".svg"):
        raise UserError(f"--timeline {path}: name a file that ends in .json (for Perfetto) or .svg")
    if os.path.isdir(path) or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise UserError(f"--timeline {path}: cannot be written; name a file in a writable directory")


def watch(engine) -> None:
    engine.cache.log, engine.source.spans = [], []
    if engine.host is not None:
        engine.host.log = []


def save(engine, path: Path) -> None:
    """Write what the engine has done since `watch`."""
    cache, at = engine.cache, engine.cache.lane.seconds
    computed = [(name, layer, at(start), at(end)) for name, layer, start, end in engine.source.spans]
    run = trace(cache.log, computed, cache.lane.chunk, {slot.transfer for slot in cache.slots}, cache.since,
                engine.host.log if engine.host is not None else ())
    with atomic(path, "w") as file:
        file.write(json.dumps(run) if path.suffix == ".json" else picture(run["traceEvents"]))
