"""Both lanes of a run: what was computed, what crossed the link, and who waited for whom.

`watch` has the engine keep its transfers and the spans of its computation, `record` makes a `Timeline` of them, and
`write` puts it into a file: as JSON a Chrome trace, which ui.perfetto.dev and chrome://tracing open, all of the run;
as SVG a picture of the prefill and of a few tokens of the decode. The replay of the bench can feed it as well.
"""

import json
import math
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .link import Transfer
from .packed import atomic

GAP = 50e-6                                 # seconds; pieces of a transfer no further apart are one
SHOWN = 60                                  # transfers of a prefill, and
VISITS = 24                                 # layer visits of a decode, that a picture holds and one can still read
WIDTH, LEFT, ROW = 960, 66, 30              # the picture's pixels
COLOURS = {"attention": ("#56b4e9", "attention"), "expert": ("#0072b2", "an expert"), "stall": ("#fbd9d3", "waits for the link"),
           "prefill": ("#e0a92a", "prefill transfer"), "demand": ("#d55e00", "transfer on demand"),
           "prefetch": ("#2a9d74", "prefetch, used"), "kept": ("#a9dcc8", "prefetch, not used yet"),
           "wasted": ("url(#waste)", "wasted: dropped or evicted unused"), "idle": ("#eeeeee", "idle")}


@dataclass(slots=True)
class Piece:
    """A stretch of one transfer. Kind: demand, prefetch or prefill; use: used, wasted, or kept (still in its slot)."""

    start: float
    end: float
    transfer: Transfer
    kind: str
    use: str
    nbytes: int


class Timeline:
    """`transfers` that moved, `computed` (name, layer, start, end), seconds of one clock; `chunk` as the lane sends them;
    `kept`: the transfers whose experts are still in their slots."""

    def __init__(self, transfers: list[Transfer], computed: list[tuple[str, int, float, float]], chunk: int, kept=()):
        self.computed = computed
        self.steps = [start for name, layer, start, _ in computed if name == "attention" and layer == 0]
        decode = self.steps[1] if len(self.steps) > 1 else math.inf
        pieces = []
        for t in transfers:
            kind = "prefetch" if t.predicted else "prefill" if t.asked < decode else "demand"
            use = "used" if t.used else "kept" if t in kept else "wasted"
            for i, (start, end) in enumerate(t.spans):      # all but the last piece are of the chunk's size
                pieces.append(Piece(start, end, t, kind, use, t.sent - i * chunk if i + 1 == len(t.spans) else chunk))
        self.pieces: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: piece.start):
            last = self.pieces[-1] if self.pieces else None
            if last and last.transfer is piece.transfer and piece.start - last.end <= GAP:
                last.end, last.nbytes = max(last.end, piece.end), last.nbytes + piece.nbytes
                continue
            if last:                        # CUDA's times are floats: neighbours may seem to overlap by a hair
                piece.start = max(piece.start, last.end)
                piece.end = max(piece.start, piece.end)
            self.pieces.append(piece)
        self.start = min([start for _, _, start, _ in computed] + [piece.start for piece in self.pieces], default=0.0)

    def trace(self) -> dict:
        """The run in the Chrome trace event format; microseconds from its first event."""
        def event(tid, name, start, end, **args):
            start, end = (round(1e6 * (t - self.start), 3) for t in (start, end))
            return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": start, "dur": round(end - start, 3), "args": args}

        events = [{"ph": "M", "pid": 1, "tid": tid, "name": name, "args": {"name": value}} for tid, name, value in (
            (0, "process_name", "duoserve"), (1, "thread_name", "compute"), (2, "thread_name", "link"))]
        for name, layer, start, end in self.computed:
            what, _, e = name.partition(" ")
            events.append(event(1, f"layer {layer} {name}", start, end, layer=layer, kind=what, **({"expert": int(e)} if e else {})))
        for p in self.pieces:
            layer, e = p.transfer.key
            events.append(event(2, f"{p.kind} {layer}.{e}", p.start, p.end, layer=layer, expert=e, kind=p.kind, use=p.use, bytes=p.nbytes))
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def stalls(self) -> list[tuple[float, float]]:
        """When the computation had nothing to do until an expert had arrived."""
        arrived: dict = {}
        for p in self.pieces:
            arrived.setdefault(p.transfer.key, []).append(p.end)
        out = []
        for (*_, before), (name, layer, start, _) in zip(self.computed, self.computed[1:]):
            ends = arrived.get((layer, int(name.split()[1])), []) if name != "attention" else []
            i = bisect_right(ends, start + GAP)
            if i and ends[i - 1] > before:
                out.append((before, start))
        return out

    def windows(self) -> list[tuple[str, float, float]]:
        """What a picture has room for: (title, start, end) of the prefill or its beginning, and of the last tokens' decode."""
        visits = [(start, layer) for name, layer, start, _ in self.computed if name == "attention"]
        bounds = [start for start, _ in visits] + [max((end for *_, end in self.computed), default=0.0)]
        steps = [i for i, (_, layer) in enumerate(visits) if layer == 0] + [len(visits)]
        out = []
        if visits:
            stop = steps[1]
            while stop > 2 and sum(p.start < bounds[stop] for p in self.pieces) > SHOWN:
                stop -= 1
            part = f"layers 0 to {stop - 1} of {steps[1]}" if stop < steps[1] else "layer by layer"
            out.append((f"Prefill: the whole prompt at once, {part}", bounds[0], bounds[stop]))
        if len(steps) > 2:
            first = max(1, len(steps) - 4)
            start, stop = steps[first], min(steps[first] + VISITS, len(visits))
            last = first + sum(start < i < stop for i in steps)
            part = f"tokens {first} to {last}, one after another" if last > first else f"token {first}"
            part += f", as far as layer {visits[stop - 1][1]}" if stop not in steps else ""
            out.append((f"Decode: {part}", bounds[start], bounds[stop]))
        return out

    def picture(self) -> str:
        """An SVG of the windows, each on a time scale of its own."""
        body, seen, x, y = [], {"idle"}, 12, 58
        for window in self.windows():
            body += self._panel(*window, y, seen)
            y += 182
        for name, (colour, label) in COLOURS.items():
            if name in seen:
                body += [box(x, 36, 14, 11, colour), text(x + 18, 45, label)]
                x += 36 + round(5.6 * len(label))
        body.append(text(12, 22, "What is computed, and what crosses the link meanwhile", 'font-size="15" font-weight="bold"'))
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="11" fill="#222">',
            '<defs><pattern id="waste" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<rect width="5" height="5" fill="#ddd"/><rect width="2" height="5" fill="#888"/></pattern></defs>',
            box(0, 0, WIDTH, y, "#fff"), *body, "</svg>", ""])

    def _panel(self, title: str, begin: float, stop: float, y: int, seen: set[str]) -> list[str]:
        """One window's two lanes, from `y` down; `seen` gathers what the legend has to explain."""
        span, total = max(stop - begin, 1e-9), {"computed": 0.0, "stall": 0.0, "link": 0.0}
        compute, link, right = y + 46, y + 46 + ROW + 26, WIDTH - 12

        def at(t: float) -> float:
            return LEFT + (right - LEFT) * (min(max(t, begin), stop) - begin) / span

        def block(start, end, top, name, label, tip, lane):
            if end < begin or start > stop:
                return []
            seen.add(name)
            total[lane] += min(end, stop) - max(start, begin)
            x, wide = at(start), max(at(end) - at(start), 0.8)
            drawn = [box(x, top, wide, ROW, COLOURS[name][0], tip)]
            if wide >= 5.6 * len(label) and label:
                drawn.append(text(x + wide / 2, top + ROW / 2 + 3.5, label, f'font-size="9.5" fill="{"#222" if name == "wasted" else "#fff"}" text-anchor="middle"'))
            return drawn

        out = [box(LEFT, top, right - LEFT, ROW, COLOURS["idle"][0]) for top in (compute, link)]
        out += [text(LEFT - 8, top + ROW / 2 + 4, lane, 'font-weight="bold" text-anchor="end"')
                for top, lane in ((compute, "compute"), (link, "link"))]
        for start, end in self.stalls():
            out += block(start, end, compute, "stall", "", "waits for the link", "stall")
        used = {}
        for name, layer, start, end in self.computed:
            what, _, e = name.partition(" ")
            used.setdefault((layer, e), []).append(start)
            out += block(start, end, compute, what, f"{layer}.{e}" if e else "", f"layer {layer}, {name}", "computed")
            if name == "attention" and begin <= start < stop:
                out.append(f'<path d="M{at(start):.1f} {y + 30}V{link + ROW}" stroke="#999" stroke-width="0.5"/>')
                out.append(text(at(start) + 3, y + 40, f"layer {layer}" if layer == 0 else layer, 'font-size="9.5" fill="#666"'))
        for p in self.pieces:
            layer, e = p.transfer.key
            name = p.use if p.use == "wasted" or p.kind == "prefetch" and p.use == "kept" else p.kind
            out += block(p.start, p.end, link, name, f"{layer}.{e}", f"layer {layer}, expert {e}: {p.kind}, {p.use}", "link")
            if p.use == "used" and p.end == p.transfer.spans[-1][1] and begin <= p.end <= stop:
                uses = used.get((layer, str(e)), [])
                i = bisect_right(uses, p.end - GAP)
                if i < len(uses) and uses[i] <= stop:
                    out.append(f'<path d="M{at(p.end):.1f} {link}L{at(uses[i]):.1f} {compute + ROW}" stroke="#777" stroke-width="0.7"/>')
        step = 10 ** math.floor(math.log10(span * 1e3 / 5))
        step *= next(m for m in (5, 2, 1) if span * 1e3 / (step * m) >= 5)
        for i in range(int(span * 1e3 / step) + 1):
            x = at(begin + i * step / 1e3)
            out += [f'<path d="M{x:.1f} {link + ROW}v4" stroke="#222"/>', text(x, link + ROW + 15, f"{i * step:g}", 'text-anchor="middle"')]
        out.append(text(LEFT - 8, link + ROW + 15, "ms", 'text-anchor="end"'))
        share = {name: f"{100 * seconds / span:.0f} %" for name, seconds in total.items()}
        caption = f"computing {share['computed']} of the time, waiting for the link {share['stall']}; the link busy {share['link']}"
        return out + [text(12, y + 18, title, 'font-size="13" font-weight="bold"'), text(right, y + 18, caption, 'text-anchor="end"')]


def box(x: float, y: float, width: float, height: float, colour: str, tip: str = "") -> str:
    rect = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"'
    return f"{rect}><title>{tip}</title></rect>" if tip else f"{rect}/>"


def text(x: float, y: float, content, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{content}</text>'


def check(path: Path) -> None:
    """Before the run: can the timeline be written there?"""
    if path.suffix not in (".json", ".svg"):
        raise UserError(f"--timeline {path}: name a file that ends in .json (for Perfetto) or .svg (a picture)")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a directory")
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}").close()
    except OSError as error:
        raise UserError(f"--timeline {path}: cannot be written ({error.strerror}); name a file in a directory that can") from None


def watch(engine) -> None:
    """From now on the engine keeps what a timeline needs; until then it costs it nothing."""
    engine.cache.log, engine.source.spans = [], []


def record(engine) -> Timeline:
    """Of what the engine has done since `watch`."""
    lane = engine.cache.lane
    computed = [(name, layer, lane.seconds(start), lane.seconds(end)) for name, layer, start, end in engine.source.spans]
    return Timeline(engine.cache.log, computed, lane.chunk, {slot.transfer for slot in engine.cache.slots})


def write(timeline: Timeline, path: Path) -> None:
    with atomic(path, "w") as file:
        file.write(json.dumps(timeline.trace()) if path.suffix == ".json" else timeline.picture())
