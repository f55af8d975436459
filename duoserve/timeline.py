"""The lanes of a run: what the device computed, what crossed the link meanwhile, what the host computed, and
which waited for which.

`watch` has the engine keep its transfers and the spans of its computation; `save` writes them down: all of
them as JSON in Chrome's trace format (ui.perfetto.dev opens it), or a picture of the prefill and of the first
tokens as SVG, if wanted beside the baseline's. `trace` and `picture` need no engine. (In decode on a GPU a
layer's attention and those of its experts that are there are one graph, and so one block.)
"""

import json
import math
import os
import sys
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import replace
from html import escape
from pathlib import Path

from .errors import UserError
from .files import atomic
from .link import Transfer

COMPUTE, LINK, HOST = 1, 2, 3               # the lanes, as a trace numbers them
GAP = 50                                    # microseconds; pieces of a transfer this near are drawn as one
BLOCKS = 100                                # most in one panel of a picture, to be told apart
TOKENS = 3                                  # of decode, at most, in a picture
WIDTH, LEFT, RIGHT, ROW = 960, 74, 944, 24  # its pixels
COLOURS = {"attention": "#56b4e9", "expert": "#0072b2", "awaiting link": "#fbd5ce",
           "awaiting host": "#e6d7ec", "prefill transfer": "#dba11c", "demand transfer": "#d55e00",
           "prefetch": "#2a9d74", "wasted": "url(#waste)", "on-host": "#8e5ea2", "idle": "#eee"}


def event(lane: int, start: float, end: float, kind: str, *place: int, **more) -> dict:
    """A block of a lane; `place` is a layer, or a layer and an expert of it."""
    args = {"kind": kind} | dict(zip(("layer", "expert"), place)) | more
    return {"ph": "X", "pid": 1, "tid": lane, "name": f"{kind} {'.'.join(map(str, place))}", "ts": start,
            "dur": round(end - start, 3), "args": args}


def trace(transfers: list[Transfer], computed: list[tuple[str, int, float, float]], kept=(),
          decode: float = math.inf, hosted=()) -> dict:
    """Chrome's trace of `transfers`, of what was `computed`: (name, layer, start, end), and of what was
    `hosted`: ((layer, expert), start, end).

    A transfer's kind is prefill if it was asked for before `decode` began, else prefetch or demand. It was
    used, or wasted (dropped or evicted before a use), or is one of the `kept`, whose experts are still in
    their slots.
    """
    spans = sorted(((*span, t) for t in transfers for span in t.spans), key=lambda s: s[:2])
    origin = min([start for _, _, start, _ in computed[:1]] + [start for start, *_ in spans[:1]], default=0.0)
    micro, free, last = lambda seconds: round(1e6 * (seconds - origin), 3), 0.0, None
    names = [("process", 0, "duoserve"), ("thread", COMPUTE, "compute"), ("thread", LINK, "link")]
    names += [("thread", HOST, "host")] * bool(hosted)
    events = [{"ph": "M", "pid": 1, "tid": lane, "name": f"{kind}_name", "args": {"name": name}}
              for kind, lane, name in names]
    for name, layer, start, end in computed:
        kind, *expert = name.split()
        events.append(event(COMPUTE, micro(start), micro(end), kind, layer, *map(int, expert)))
    events += [event(HOST, micro(start), micro(end), "on-host", *key) for key, start, end in hosted]
    for start, end, nbytes, t in spans:
        start, end = max(free, micro(start)), max(free, micro(end))         # CUDA's times are rounded
        if t is last and start - free <= GAP:
            events[-1]["dur"] = round(end - events[-1]["ts"], 3)
            events[-1]["args"]["bytes"] += nbytes
        else:
            kind = "prefill" if t.asked < decode else "prefetch" if t.predicted else "demand"
            use = "used" if t.used else "kept" if t in kept else "wasted"
            events.append(event(LINK, start, end, kind, *t.key, use=use, bytes=nbytes))
        free, last = end, t
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def last_of(times: deque, by: float) -> float:
    """The last of these times that is past by then, -infinity if none is; all that are past are taken out."""
    last = -math.inf
    while times and times[0] <= by:
        last = times.popleft()
    return last


class Run:
    """A trace, laid out to be drawn, in microseconds.

    `lanes`: each one's blocks (start, end, name, args). `uses`: when a transfer arrived, and when its expert
    was computed. `bounds`: where each visit of a layer begins, and where the last one ends. `steps`: the
    visits that begin a pass, and how many visits there are.
    """

    def __init__(self, events: list[dict]):
        self.lanes, arrivals = {COMPUTE: [], LINK: [], HOST: []}, defaultdict(deque)
        self.uses, self.bounds, self.steps, before = [], [], [], math.inf
        for e in (e for e in events if e["ph"] == "X"):             # (the first are names)
            args, end = e["args"], e["ts"] + e["dur"]
            self.lanes[e["tid"]].append((e["ts"], end, e["name"], args))
            if args.get("use") == "used":
                arrivals[args["layer"], args["expert"]].append(end)
        answers = deque(sorted(end for _, end, *_ in self.lanes[HOST]))
        for start, end, _, args in list(self.lanes[COMPUTE]):
            arrived = last_of(arrivals[args["layer"], args.get("expert")], start + GAP)
            self.uses.append((arrived, start))
            for kind, until in (("link", arrived), ("host", last_of(answers, start + GAP))):
                if before < until:
                    until = min(until, start)
                    self.lanes[COMPUTE].append((before, until, "", {"kind": f"awaiting {kind}"}))
                    before = until
            if args["kind"] == "attention":
                self.steps += [len(self.bounds)] * (args["layer"] == 0)
                self.bounds.append(start)
            before = end
        self.steps.append(len(self.bounds))
        self.bounds.append(before)

    def part(self, step: int, visits: int) -> tuple[float, float]:
        """When that many visits begin and end, from a step's first."""
        return self.bounds[self.steps[step]], self.bounds[self.steps[step] + visits]

    def blocks(self, begin: float, end: float) -> int:
        return sum(begin <= b[0] < end for lane in self.lanes.values() for b in lane)


def picture(runs: dict[str, list[dict]], title: str) -> str:
    """An SVG of one run, or of several with the same prompt: their policies' names and their traces' events.
    A panel each for the prefill and for the first tokens after it, of the same visits at the same scale."""
    laid, y, svg = {name: Run(events) for name, events in runs.items()}, 56, []
    for step, last in ((0, 1), (1, 1 + TOKENS)):
        here = {name: run for name, run in laid.items() if len(run.steps) > step + 1}
        whole = visits = min((run.steps[:last + 1][-1] - run.steps[step] for run in here.values()), default=0)
        while visits > 1 and any(run.blocks(*run.part(step, visits)) > BLOCKS for run in here.values()):
            visits -= 1
        parts = [run.part(step, visits) for run in here.values()]
        scale = (RIGHT - LEFT) / max([1.0, *(end - begin for begin, end in parts)])
        what = f"decode, {visits} layer visits" if step else f"prefill, {visits} of {whole} layers"
        for (name, run), (begin, end) in zip(here.items(), parts):
            svg += panel(f"{name}: {what}", run, begin, end, scale, y, bool(step))
            y += 166 if run.lanes[HOST] else 136
    drawn, x = "".join(svg), 12
    for name, colour in COLOURS.items():
        if f'fill="{colour}"' in drawn:
            svg += [box(x, 33, 14, 11, colour), text(x + 18, 43, name)]
            x += 24 + 7.2 * len(name)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif">',
        '<pattern id="waste" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0H5V5H0" fill="#ddd"/>'
        '<path d="M0 0H2V5H0" fill="#777"/></pattern>',
        box(0, 0, WIDTH, y, "#fff"), text(12, 21, title, min(15, int(1200 / max(1, len(title))))),
        text(RIGHT, 21, "3.5: expert 5 of layer 3", anchor="end"), *svg, "</svg>\n"])


def panel(title: str, run: Run, begin: float, end: float, scale: float, y: int, decoding: bool) -> list[str]:
    """A run's lanes from `begin` to `end`, at `scale` pixels a microsecond; `y` is its top."""
    top, low, free, svg, marks = y + 38, y + 80, 0.0, [], []
    rows = [(COMPUTE, "compute", top), (LINK, "link", low)]
    rows += [(HOST, "host", low + 30)] * bool(run.lanes[HOST])
    share = defaultdict(float)              # of the time, by kind of block or by lane
    at = lambda t: LEFT + scale * (min(max(t, begin), end) - begin)
    width, bottom = at(end) - LEFT, rows[-1][2] + ROW
    for lane, name, row in rows:
        svg += [text(12, row + 16, name), box(LEFT, row, width, ROW, COLOURS["idle"])]
        for start, stop, name, args in (b for b in run.lanes[lane] if b[1] >= begin and b[0] < end):
            x, wide, kind = at(start), at(stop) - at(start), args["kind"]
            share[kind if not name else lane] += wide / max(width, 1e-9)
            if args.get("use") == "wasted":
                kind = "wasted"
            colour = COLOURS.get(kind) or COLOURS[f"{kind} transfer"]
            svg.append(box(x, row, max(wide, 0.8), ROW, colour, name))
            if kind == "attention":
                marks.append((x, decoding and args["layer"] == 0, args["layer"]))
            elif "expert" in args and kind != "wasted" and wide >= 3 + 7 * len(label := name.split()[1]):
                svg.append(text(x + 2, row + 16, label, colour="#222" if kind == "prefill" else "#fff"))
    for i, (x, token, layer) in enumerate(marks):
        ahead = [RIGHT] + [other for other, begins, _ in marks[i + 1:] if begins and not token]
        if token:
            svg.append(box(x, y + 22, 1, bottom - y - 22, "#222"))
        if free <= x and min(ahead) - x >= 60:
            free, word = x + 60, f"token {2 + sum(begins for _, begins, _ in marks[:i])}"
            svg += [box(x, y + 24, 1, 14, "#777"), text(x + 4, y + 34, word if token else f"layer {layer}",
                                                        colour="#222" if token else "#666")]
    lines = [f"M{at(arrived):.1f} {low}L{at(start):.1f} {top + ROW}" for arrived, start in run.uses
             if begin <= arrived and start < end]
    svg += [f'<path d="{line}" stroke="#777" stroke-width=".7"/>' for line in lines]
    step = 10.0 ** math.floor(math.log10(60 / scale))       # a round number of microseconds between ticks
    step *= next(n for n in (1, 2, 5, 10) if n * step * scale >= 60)
    for i in range(int((end - begin) / step) + 1):
        x, ms = at(begin + i * step), i * step / 1e3
        svg += [box(x, bottom, 1, 4, "#777"),
                text(x, bottom + 14, f"{ms:g}" if ms else "0 ms", anchor="middle")]
    hosted = bool(run.lanes[HOST])
    caption = f"{(end - begin) / 1e3:.0f} ms: computing {share[COMPUTE]:.0%}, awaiting link "
    caption += f"{share['awaiting link']:.0%}" + f", host {share['awaiting host']:.0%}" * hosted
    caption += f"; at work: link {share[LINK]:.0%}" + f", host {share[HOST]:.0%}" * hosted
    return svg + [text(12, y + 14, title, 14), text(RIGHT, y + 14, caption, anchor="end")]


def box(x: float, y: float, width: float, height: float, colour: str, tip: str = "") -> str:
    shape = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect {shape} fill="{colour}" stroke="#fff" stroke-width=".4"><title>{tip}</title></rect>'


def text(x: float, y: float, words: str, size: int = 12, colour: str = "#222", anchor: str = "start") -> str:
    shape = f'x="{x:.1f}" y="{y}" font-size="{size}"'
    return f'<text {shape} fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


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


def draw(engine, path: Path, prompt: list[int], params) -> None:
    """`save` a finished request; and into a picture, where there is a link to wait for, its first tokens once
    more, by the baseline, from what is in the slots when an engine is new."""
    runs = save(engine, path)               # (first: this one is kept in any case)
    if (path.suffix == ".svg" and engine.policy != "on-demand" and engine.cache.transfer_s()
            and engine.result.finish_reason != "interrupted"):
        print("[for the picture the first tokens once more, with on-demand; Ctrl-C leaves that out]",
              file=sys.stderr)
        with suppress(KeyboardInterrupt):
            engine.policy = "on-demand"
            engine.fill_slots()
            watch(engine)
            engine.generate(prompt, replace(params, max_new_tokens=min(params.max_new_tokens, 1 + TOKENS)))
            save(engine, path, runs)


def save(engine, path: Path, runs: dict[str, dict] = {}) -> dict[str, dict]:
    """Write what the engine has done since `watch`; in a picture with earlier `runs` of it, a trace for each
    policy. -> those and this."""
    cache, host, at = engine.cache, engine.host, engine.cache.lane.seconds
    computed = [(name, layer, at(start), at(end)) for name, layer, start, end in engine.source.spans]
    run = trace(cache.log, computed, {slot.transfer for slot in cache.slots}, cache.since,
                host.log if host is not None else ())
    runs = runs | {Path(engine.policy).name: run}
    events = {name: run["traceEvents"] for name, run in runs.items()}
    speed = lambda seconds: f"{cache.expert_bytes / seconds / 1e9:.3g} GB/s" if seconds else "without end"
    title = f"{' beside '.join(runs)}: {engine.packed.directory.resolve().name}, link "
    title += speed(cache.transfer_s())
    if any(e["tid"] == HOST for run in events.values() for e in run):
        title += f", host {speed(host.seconds())}"
    title += " (simulated)" * bool(engine.options.simulate_link)
    with atomic(path) as file:
        file.write((json.dumps(run) if path.suffix == ".json" else picture(events, title)).encode())
    return runs
