"""The report of a folder of results: one HTML page that needs nothing else, and its charts as SVG files."""

import html
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path

from .charts import Chart, Look, Panel, Series, alone, plotly, svg
from .problems import MODES, Problem
from .providers import BASELINE, PROVIDERS
from .results import Environment, Row

OURS = "fusedrnn"
AXES = {"H": "hidden size H", "B": "batch size B", "T": "steps T"}
TIMED = ("forward", "train", "latency")
MODE_NAMES = {
    "forward": "Inference of a sequence",
    "train": "Training step",
    "latency": "One step",
    "memory": "Peak memory of a training step",
}
CELL_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN (tanh)", "rnn_relu": "RNN (relu)"}
LETTERS = """A problem is a layer and its input: <b>H</b> is the hidden size (units of a layer), <b>I</b> the input size
(I = H where it is not given), <b>B</b> the batch (sequences at once), <b>T</b> the steps of a sequence. Modes:
<b>inference</b> is a forward pass without gradients, a <b>training step</b> is forward and backward with all gradients,
<b>one step</b> is a single step of the sequence (torch.nn's Cell), <b>memory</b> the most that a training step holds at
a time."""
METHOD = f"""All get the same weights and the same input and take turns, round after round. Nobody is timed before its
results agreed with float64. A time is the median of the rounds. "Times as fast" is {BASELINE}'s time divided by the
provider's own, out of the same rounds: above 1 is faster than {BASELINE}. Bars and brackets are the middle half of the
rounds."""
# What a branch of torch.nn or another library is, for readers who do not know its name.
BRANCHES = {
    "ATen loop": "torch's own loop of matrix products and pointwise operations, a step after the other",
    "Cell: ATen": "a Cell of torch.nn (LSTMCell, GRUCell, RNNCell), made of torch's plain operations",
    "oneDNN": "Intel's library for neural networks, which torch calls for an LSTM on a CPU",
    "cuDNN": "NVIDIA's library for neural networks; the words behind it are its algorithm",
    "cpu": "fusedrnn's kernels for the CPU, in C++",
    "cuda": "fusedrnn's CUDA kernels; behind it the algorithm",
    "triton": "fusedrnn's Triton kernels; behind it the algorithm",
    "CPUExecutionProvider": "ONNX Runtime's way for a CPU",
    "inductor, unrolled": "torch.compile of plain operations, all steps in one program",
}
STYLE = """
:root{--text:#1a1a1a;--soft:#555;--ground:#fff;--line:#ccc;--panel:#f4f6f8;--warn:#fff3d6}
@media(prefers-color-scheme:dark){:root{--text:#e6e6e6;--soft:#a8a8a8;--ground:#14171a;--line:#3a3f45;--panel:#1e2328;
--warn:#3d3113}}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;color:var(--text);
background:var(--ground)}
h1,h2,h3{line-height:1.2}h2{border-bottom:1px solid var(--line);margin-top:2.5rem;padding-bottom:.2rem}
.result{font-size:1.15rem;background:var(--panel);padding:.8rem 1rem;border-left:4px solid #1f83d6;margin:1rem 0}
.warning{background:var(--warn);padding:.6rem 1rem;border-left:4px solid #e69f00;margin:1rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:1rem 0}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,th.words,td.words{text-align:left}td.words{white-space:normal;min-width:9rem}tbody th{font-weight:400}
thead th{border-bottom:2px solid var(--soft);vertical-align:bottom}thead th[data-sorts]{cursor:pointer}
td.best{font-weight:700}td.spoiled{opacity:.55}small{color:var(--soft)}dt{font-weight:600}dd{margin:0 0 .3rem 1.2rem}
figure{margin:1.5rem 0}figcaption{color:var(--soft);font-size:.9rem}
.still{overflow-x:auto}.still svg{width:100%;min-width:600px;height:auto}.live{display:none}
.drawn .still{display:none}.drawn .live{display:block}
@media print{.drawn .still{display:block}.drawn .live{display:none}.still svg{min-width:0}h2{break-before:page}
figure{break-inside:avoid}body{max-width:none}}
.letters{color:var(--soft);font-size:.9rem}
@media(max-width:600px){table{font-size:.68rem}th,td{padding:.2rem .22rem}th,td{white-space:normal}
caption{max-width:calc(100vw - 2rem)}
.spread{display:none}.spread+br{display:none}.letters{font-size:.85rem}}
"""
SCRIPT = """
const text=()=>getComputedStyle(document.body).color;
const clothed=(value)=>JSON.parse(JSON.stringify(value).replaceAll('#010203',text()));
const thin=(layout,width)=>{for(const axis of Object.values(layout)){if(!axis.tickvals||!axis.range)continue;
const [low,high]=axis.range,at=v=>(Math.log10(v)-low)/(high-low)*width*.5;let last=-99;
const kept=axis.tickvals.filter(v=>{const x=at(v);
if(v!==1&&(x-last<30||Math.abs(x-at(1))<30))return false;last=x;return true});
axis.tickvals=kept;axis.ticktext=kept.map(String)}};
const draw=()=>{for(const figure of document.querySelectorAll('figure')){
const spec=clothed(JSON.parse(figure.querySelector('script').textContent));
if(spec.columns>1&&figure.clientWidth<600){figure.classList.remove('drawn');continue}
Object.assign(spec.layout,{paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)',
font:{color:text(),family:'system-ui,sans-serif'},hoverlabel:{align:'left',font:{size:12}},modebar:{bgcolor:'rgba(0,0,0,0)',color:'#8a8a8a'}});
const narrow=figure.clientWidth<600;if(narrow){thin(spec.layout,figure.clientWidth);
for(const a of spec.layout.annotations)
if(a.yanchor==='bottom')Object.assign(a,{x:1,xanchor:'right'});else a.font.size=9;
for(const [name,axis] of Object.entries(spec.layout))if(name.startsWith('xaxis')&&axis.title.text)
axis.title={...axis.title,font:{size:11},text:axis.title.text.replace(/^(.{26,}?) /,'$1<br>')};
const more=20*spec.data.filter(t=>t.showlegend).length;spec.layout.margin.b+=more;spec.layout.height+=more}
figure.classList.add('drawn');
Plotly.react(figure.querySelector('.live'),spec.data,spec.layout,{responsive:true,displaylogo:false,displayModeBar:!narrow,
modeBarButtonsToRemove:['lasso2d','select2d']})}};
if(window.Plotly){draw();matchMedia('(prefers-color-scheme:dark)').addEventListener('change',draw)}
for(const head of document.querySelectorAll('th[data-sorts]'))head.addEventListener('click',()=>{
const body=head.closest('table').tBodies[0],k=head.cellIndex,down=head.dataset.down=head.dataset.down==='1'?'0':'1';
const value=row=>{const v=row.cells[k].dataset.value;return v===undefined?row.cells[k].textContent:Number(v)};
[...body.rows].sort((a,b)=>{const x=value(a),y=value(b);
return (down==='1'?1:-1)*(typeof x==='number'&&typeof y==='number'?x-y:String(x).localeCompare(String(y)))})
.forEach(row=>body.append(row))});
"""


def write_report(rows: list[Row], left_out: dict[str, str], folder: Path) -> str:
    """Writes report.html and the charts of every machine and version in ``rows``; tells what was written in words."""
    groups = {}
    for row in rows:
        group = row.environment, row.suite, row.dtype
        # What was measured last comes first: it is what one wants to see.
        groups = {group: [*groups.pop(group, []), row], **groups}
    sections, count = [], 0
    for number, (group, found) in enumerate(groups.items(), 1):
        charts = draw_charts(found, f"{number}-{group[1]}-{group[2]}")
        count += len(charts)
        sections.append(section(*group, found, figures(charts, folder)))
    lines = [_line(name, _words(why)) for name, why in left_out.items()]
    missing = _table("Left out of the last run", ("provider", "why"), lines) if lines else ""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about = f"""<h2>How it was measured</h2><p>{METHOD}</p>{glossary(rows)}{missing}
<p><small>Written {now} from results.csv beside this page. Machines, versions and commits never share a table or a
chart.</small></p>"""
    page = folder / "report.html"
    page.write_text(document("fusedrnn beside torch.nn", "".join(sections) + about))
    return f"report in {page} with {count} charts"


def document(title: str, body: str) -> str:
    from plotly.offline import get_plotlyjs

    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>{body}</main>
<script>{get_plotlyjs()}</script><script>{SCRIPT}</script></body></html>
"""


def figures(charts: list[Chart], folder: Path) -> str:
    """The charts for the page: still ones, which a script replaces by live ones. The still ones are files as well."""
    parts = []
    for chart in charts:
        still, caption = svg(chart), html.escape(chart.caption)
        (folder / f"{chart.name}.svg").write_text(alone(still))
        # A "<" inside of JSON could end the script.
        live = json.dumps(plotly(chart)).replace("<", "\\u003c")
        parts.append(
            f'<figure id="{chart.name}"><div class="still" role="img" aria-label="{caption}">{still}</div>'
            f'<div class="live"></div><figcaption>{caption}</figcaption>'
            f'<script type="application/json">{live}</script></figure>'
        )
    return "".join(parts)


def section(environment: Environment, suite: str, dtype: str, rows: list[Row], drawn: str) -> str:
    """One machine and version, one suite, one dtype: the result first, the numbers last."""
    about = {f.name: getattr(environment, f.name) for f in fields(Environment)}
    times = sorted(row.time for row in rows)
    about["measured"] = f"{times[0]} to {times[-1]}"
    loads = [float(row.load) for row in rows if row.load]
    about["load average"] = f"{min(loads)} to {max(loads)} meanwhile, this run included" if loads else ""
    about["providers"] = ", ".join({f"{row.provider} {row.version}": None for row in rows})
    facts = [_line(name, _words(value)) for name, value in about.items() if value != ""]
    where = f"{environment.threads} threads of {environment.device}, {dtype}, torch {environment.torch}, fusedrnn "
    where += f"{environment.fusedrnn} ({environment.commit}), {times[0][:10]}"
    result = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in in_words(rows))
    spoiled = [row for row in rows if row.spoiled]
    warning = ""
    if spoiled:
        reasons = sorted({_kind(reason) for row in spoiled for reason in row.spoiled.split("; ")})
        timed = sum(row.median is not None for row in rows)
        warning = (
            f'<div class="warning">{len(spoiled)} of {timed} times are not to be trusted '
            f"({html.escape('; '.join(reasons))}). They are drawn hollow, greyed in the tables, and left out of all "
            "counts and means. A run on a quiet machine, into another folder (--out), has them anew.</div>"
        )
    parts = [
        f"<h2>{html.escape(suite)}, {dtype}, {html.escape(environment.device)}</h2>",
        f'<div class="result">{result}</div><p>Measured on {html.escape(where)}.</p>{warning}'
        f'<p class="letters">{LETTERS}</p>',
        drawn,
        summary(rows),
    ]
    parts += [table(mode, rows) for mode in MODES if any(r.mode == mode and r.status == "ok" for r in rows)]
    return "".join(parts) + refused(rows) + _table("Where and with what", (), facts)


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    kinds = {
        "other programs": "other programs took the CPU meanwhile",
        "the middle half": "the rounds scatter by more than 30 %",
        "the ratio": "the ratio of the two times is not that within the rounds",
    }
    return next((words for start, words in kinds.items() if reason.startswith(start)), reason)


def judged(rows: Iterable[Row], provider: str) -> list[Row]:
    """The rows of a provider that a mean may count."""
    return [r for r in rows if r.provider == provider and r.mode in TIMED and r.speedup is not None and not r.spoiled]


def standing(row: Row) -> str:
    """faster or slower than torch.nn; level where 1 lies within the middle half of the rounds."""
    low, high = (row.speedup if v is None else v for v in (row.ratio1, row.ratio3))
    return "faster" if min(low, row.speedup) > 1 else "slower" if max(high, row.speedup) < 1 else "level"


def in_words(rows: list[Row]) -> list[str]:
    """The result in sentences."""
    mine = judged(rows, OURS)
    lost = sum(bool(r.spoiled) for r in rows if r.provider == OURS)
    left = f" {lost} more were spoiled and are left out." if lost else ""
    if not mine:
        return [f"No time of {OURS} beside {BASELINE} that could be judged.{left}"]
    groups = {name: [r for r in mine if standing(r) == name] for name in ("faster", "level", "slower")}
    mean = statistics.geometric_mean(r.speedup for r in mine)
    text = f"{OURS} is faster than {BASELINE} in {len(groups['faster'])} of {len(mine)} problems, "
    text += f"{mean:.2f} times as fast in the geometric mean."
    if groups["level"]:
        text += f" Level, within the scatter of the rounds, in {_some(groups['level'])}."
    text += f" Slower in {_some(groups['slower'])}." if groups["slower"] else " Slower in none."
    sentences = [text + left]
    # The mean of a peer is that over the problems it ran: ours over the same ones stands beside it.
    for provider in ordered(rows):
        if provider in (BASELINE, OURS) or provider.startswith(f"{BASELINE}:"):
            continue
        theirs = {(r.problem, r.mode): r.speedup for r in judged(rows, provider)}
        both = [(theirs[r.problem, r.mode], r.speedup) for r in mine if (r.problem, r.mode) in theirs]
        if both:
            them, us = (statistics.geometric_mean(values) for values in zip(*both))
            sentences.append(
                f"{provider}: {them:.2f} times as fast as {BASELINE} in the geometric mean of the {len(both)} problems "
                f"where both have a time to trust; {OURS} has {us:.2f} there."
            )
    return sentences


def titled(problem: Problem) -> str:
    return problem.name.replace(problem.cell, CELL_NAMES[problem.cell], 1)


def label(row: Row) -> str:
    kind = {"forward": "inference", "train": "training"}.get(row.mode, "")
    name = titled(row.problem)
    return f"{name}, {kind}" if kind else f"{name.replace(' T=1', '', 1)}, one step"


def _some(rows: list[Row], most: int = 4) -> str:
    names = [f"{label(r)} ({r.speedup:.2f})" for r in sorted(rows, key=lambda r: r.speedup)]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {'; '.join(names[:most])}{more}"


def summary(rows: list[Row]) -> str:
    """How every provider stands to torch.nn in every mode."""
    lines = []
    for provider in ordered(rows):
        for mode in TIMED:
            found = [r for r in judged(rows, provider) if r.mode == mode]
            lost = sum(bool(r.spoiled) for r in rows if r.provider == provider and r.mode == mode)
            if provider == BASELINE or not (found or lost):
                continue
            ratios = [r.speedup for r in found]
            count = {name: sum(standing(r) == name for r in found) for name in ("faster", "level", "slower")}
            means = ["", "", "", ""]
            if ratios:
                numbers = (statistics.geometric_mean(ratios), statistics.median(ratios), min(ratios), max(ratios))
                means = [f"{number:.2f}" for number in numbers]
            cells = [f"<td>{value}</td>" for value in (len(found), *count.values(), *means, lost)]
            lines.append(_line(provider, _words(MODE_NAMES[mode]), *cells))
    if not lines:
        return ""
    heads = ("provider", "mode", "problems", "faster", "level", "slower", "geometric mean", "median", "least")
    heads += ("greatest", "left out: spoiled")
    return _table(f"Times as fast as {BASELINE}, by provider and mode", heads, lines)


# Columns of words; a blank at the end tells two columns of one name apart.
LEFT = {"mode", "why", "problems ", "status", "provider "}


def _table(caption: str, heads: tuple[str, ...], lines: list[str], sorts: bool = False) -> str:
    def head(k: int, name: str) -> str:
        words = " class=words" if k == 0 or name in LEFT else ""
        return f"<th scope=col{words}{' data-sorts' if sorts else ''}>{html.escape(name)}</th>"

    cells = "".join(head(k, name) for k, name in enumerate(heads))
    top = f"<thead><tr>{cells}</tr></thead>" if heads else ""
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f"<div class=wide><table><caption>{html.escape(caption)}</caption>{top}{body}</table></div>"


def _line(head: str, *cells: str) -> str:
    return f"<tr><th scope=row>{html.escape(head)}</th>{''.join(cells)}</tr>"


def _words(text) -> str:
    return f"<td class=words>{html.escape(str(text))}</td>"


def ordered(rows: Iterable[Row]) -> list[str]:
    """Providers in the order of their table."""
    there = {row.provider for row in rows if row.status == "ok"}
    return [name for name in PROVIDERS if name in there] + sorted(there - set(PROVIDERS))


def by_problem(rows: Iterable[Row]) -> dict:
    found = defaultdict(dict)
    for row in rows:
        found[row.problem][row.provider] = row
    return found


def table(mode: str, rows: list[Row]) -> str:
    rows = [row for row in rows if row.mode == mode and row.status == "ok"]
    providers, lines, other_rounds = ordered(rows), [], False
    for problem, found in by_problem(rows).items():
        # Nobody is the fastest where a time that is not to be trusted is less.
        least = min((r.median for r in found.values() if r.median is not None), default=None)
        cells = []
        for row in (found.get(provider) for provider in providers):
            if row is None:
                cells.append('<td data-value="1e99">not taken</td>')
            elif mode == "memory":
                cells.append(f'<td data-value="{row.peak_bytes}">{row.peak_bytes / 2**20:.1f}</td>')
            else:
                ratio = "" if row.provider == BASELINE or row.speedup is None else f" · {row.speedup:.2f}×"
                base = found.get(BASELINE)
                if ratio and base is not None and row.baseline not in (None, base.median):
                    # A resumed run: the ratio is to torch.nn's time in rounds of its own.
                    ratio += f"<sup title='torch.nn in the same rounds: {row.baseline * 1e3:.3g} ms'>†</sup>"
                    other_rounds = True
                spread = f"{row.quartile1 * 1e3:.3g} to {row.quartile3 * 1e3:.3g}; {row.branch}"
                kind = "spoiled" if row.spoiled else "best" if len(found) > 1 and row.median == least else ""
                why = f' title="{html.escape(row.spoiled)}"' if row.spoiled else ""
                kinds = dict.fromkeys(_kind(reason) for reason in row.spoiled.split("; ")) if row.spoiled else ()
                mark = f"<br><small>spoiled: {html.escape('; '.join(kinds))}</small>" if row.spoiled else ""
                cells.append(
                    f'<td class="{kind}"{why} data-value="{row.median}">{row.median * 1e3:.3g}{ratio}'
                    f"<br><small class=spread>{html.escape(spread)}</small>{mark}</td>"
                )
        lines.append(_line(titled(problem), *cells))
    how = ", ".join(sorted({row.how for row in rows}))
    if mode == "memory":
        return _table(f"{MODE_NAMES[mode]} in MiB ({how})", ("problem", *providers), lines, sorts=True)
    text = (
        f"{MODE_NAMES[mode]}: milliseconds · times as fast as {BASELINE} (below: middle half of the rounds; what ran); "
        "bold: the fastest"
    )
    text += f", {how}"
    if any("CUDA" in row.how for row in rows):
        text += "; L2 is warm: a call finds in it what the call before left there, weights and inputs that fit in it"
    if other_rounds:
        text += f"; † {BASELINE} was timed again beside it, later, and the ratio is to that time"
    return _table(text, ("problem", *providers), lines, sorts=True)


def refused(rows: list[Row]) -> str:
    """What has no time: wrong, failed, or not taken by a provider."""
    reasons = defaultdict(list)
    for row in rows:
        if row.status != "ok":
            reasons[row.provider, row.status, row.why].append(
                label(row) if row.mode != "memory" else titled(row.problem)
            )
    lines = []
    for (provider, status, why), where in reasons.items():
        some = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(_line(provider, *map(_words, (status, why, some))))
    heads = ("provider", "status", "why", "problems ")
    return _table("Not measured, and why", heads, lines) if lines else ""


def glossary(rows: list[Row]) -> str:
    """The names of "what ran" that occur."""
    ran = {row.branch for row in rows if row.branch}
    known = {name: words for name, words in BRANCHES.items() if any(re.match(rf"{name}\b", b) for b in ran)}
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(words)}</dd>" for name, words in known.items())
    return f"<p>What ran, by name:</p><dl>{items}</dl>" if items else ""


def looks(rows: list[Row]) -> dict[str, Look]:
    """The same colour and marker for a provider in every chart; torch.nn's is that of the text."""
    others = [name for name in ordered(rows) if name not in (BASELINE, OURS)]
    return {BASELINE: Look(None), OURS: Look(0)} | {name: Look(k) for k, name in enumerate(others, 1)}


def draw_charts(rows: list[Row], prefix: str) -> list[Chart]:
    rows = [row for row in rows if row.status == "ok"]
    timed = [row for row in rows if row.mode in TIMED]
    memory = [row for row in rows if row.mode == "memory"]
    found = []
    if any(row.speedup is not None and row.provider != BASELINE for row in timed):
        found.append(ratios(timed, f"{prefix}-ratios"))
    for axis in AXES:
        chart = multiples(timed, axis, f"{prefix}-{axis}")
        found += [chart] if chart else []
    if timed:
        found.append(roofline([r for r in timed if r.mode != "latency"] or timed, f"{prefix}-roofline"))
    if memory:
        found.append(peaks(memory, f"{prefix}-memory"))
    return found


def _hover(row: Row) -> str:
    lines = [f"<b>{label(row)}</b>", f"{row.provider} {row.version} ({row.branch})"]
    if row.median is not None:
        lines.append(f"{row.median * 1e3:.4g} ms, middle half {row.quartile1 * 1e3:.4g} to {row.quartile3 * 1e3:.4g}")
    if row.speedup is not None and row.provider != BASELINE:
        inside = "" if row.ratio1 is None else f", middle half {row.ratio1:.2f} to {row.ratio3:.2f}"
        lines.append(f"{row.speedup:.2f} times as fast as {BASELINE}{inside}")
    if row.peak_bytes is not None:
        lines.append(f"{row.peak_bytes / 2**20:.1f} MiB")
    if row.spoiled:
        lines.append(f"spoiled: {row.spoiled}")
    return "<br>".join(lines)


def _dots(rows: list[Row], value: Callable[[Row], tuple], name: Callable[[Row], str], look: dict) -> list[Series]:
    """A series for each provider, and a hollow one for what was spoiled."""
    found = []
    for provider, one in look.items():
        for hollow in (False, True):
            own = [r for r in rows if r.provider == provider and bool(r.spoiled) == hollow]
            if own:
                x, low, high = zip(*map(value, own))
                bars = (None, None) if low[0] is None else (list(low), list(high))
                title = f"{provider}, spoiled" if hollow else provider
                shape = Look(one.number, hollow)
                found.append(Series(title, shape, list(x), list(map(name, own)), *bars, list(map(_hover, own))))
    return found


def orders(rows: list[Row]) -> dict[str, list[str]]:
    """The problems of one mode, sorted in three ways."""
    ours = {r.problem: r.speedup for r in rows if r.provider == OURS}
    took = {r.problem: r.baseline or r.median for r in rows}
    ways = {
        f"sorted by {OURS}'s ratio": lambda p: -ours.get(p, 0),
        "sorted by cell and size": lambda p: (list(CELL_NAMES).index(p.cell), p.H, p.B, p.T, p.L, p.D),
        f"sorted by {BASELINE}'s time": took.get,
    }
    return {name: [titled(p) for p in sorted(took, key=key)] for name, key in ways.items()}


def ratios(rows: list[Row], name: str) -> Chart:
    """Who is faster where: a line for each problem, a dot for each provider."""
    taken = [row for row in rows if row.speedup is not None and row.provider != BASELINE]
    look = {provider: one for provider, one in looks(rows).items() if provider != BASELINE}
    value = lambda r: (r.speedup, *((r.speedup, r.speedup) if r.ratio1 is None else (r.ratio1, r.ratio3)))
    x_title, panels = f"times as fast as {BASELINE} →", []
    for mode in TIMED:
        here = [row for row in taken if row.mode == mode]
        if here:
            ways = orders(here)
            series = _dots(here, value, lambda r: titled(r.problem), look)
            first = next(iter(ways.values()))
            panels.append(Panel(MODE_NAMES[mode], series, x_title, rows=first, line_at=1.0, orders=ways))
    caption = (
        f"Who is faster where: right of the dashed line, which is {BASELINE}. Bars are the middle half of the rounds."
    )
    return Chart(name, caption, panels)


def families(rows: Iterable[Row], axis: str) -> list[list]:
    """Problems that differ in ``axis`` alone (I follows H), each family sorted along it, the longest first."""
    found = defaultdict(set)
    for row in rows:
        fixed = [getattr(row, name) for name in ("cell", "T", "B", "H", "L", "D") if name != axis]
        fixed += [row.I if axis != "H" else row.I - row.H]
        found[(*fixed,)].add(row.problem)
    sorted_ones = [sorted(family, key=lambda p: getattr(p, axis)) for family in found.values()]
    return sorted((f for f in sorted_ones if len(f) > 2), key=len, reverse=True)


def multiples(rows: list[Row], axis: str, name: str) -> Chart | None:
    """Time a step against one size: a panel for each cell and mode, a line for each provider. None: nothing varies."""
    panels = []
    for mode in TIMED if axis != "T" else TIMED[:2]:
        for cell in CELL_NAMES:
            here = [row for row in rows if row.mode == mode and row.cell == cell and not row.spoiled]
            for family in families(here, axis)[:1]:
                series = []
                for provider, look in looks(rows).items():
                    own = sorted((r for r in here if r.provider == provider and r.problem in family),
                                 key=lambda r: getattr(r, axis))  # fmt: skip
                    if own:
                        x = [getattr(r, axis) for r in own]
                        y, low, high = ([getattr(r, time) / r.T * 1e6 for r in own] for time in
                                        ("median", "quartile1", "quartile3"))  # fmt: skip
                        look = Look(look.number, line=True)
                        series.append(Series(provider, look, x, y, low, high, list(map(_hover, own))))
                others = [a for a in AXES if a != axis and (a, mode) != ("T", "latency")]
                fixed = " ".join(f"{a}={getattr(family[0], a)}" for a in others)
                words = MODE_NAMES[mode].lower().replace(" of a sequence", "")
                sizes = [getattr(p, axis) for p in family]
                title = f"{CELL_NAMES[cell]}, {words}, {fixed}"
                panels.append(Panel(title, series, AXES[axis], "µs a step", x_ticks=sizes))
    caption = (
        f"Time of a step against {AXES[axis]}; a panel is one cell in one mode, the other sizes fixed. Lower is faster."
    )
    return Chart(name, caption, panels, columns=min(len(panels), 2)) if panels else None


def roofline(rows: list[Row], name: str) -> Chart:
    """Achieved operations a second, under the machine's peaks where these are known."""
    intensity = lambda row: row.problem.flops(row.mode) / row.problem.bytes(row.mode)
    look = looks(rows)
    series, placed = [], []
    for provider, one in look.items():
        own = [row for row in rows if row.provider == provider and not row.spoiled]
        x, y = [intensity(r) for r in own], [r.problem.flops(r.mode) / r.median / 1e9 for r in own]
        labels = [""] * len(own)
        if provider == OURS:
            labels = [_free(placed, a, b, short(r)) for a, b, r in zip(x, y, own)]
        if own:
            series.append(Series(provider, one, x, y, hover=list(map(_hover, own)), labels=labels))
    known = [row for row in rows if row.peak_flops and row.peak_bandwidth]
    note = f"no roof: {rows[0].peaks_from}"
    if known:
        top = max(row.peak_flops for row in known) / 1e9
        slope = max(row.peak_bandwidth for row in known) / 1e9
        xs = [intensity(row) for row in rows]
        low, high = min(*xs, top / slope) / 2, max(*xs, top / slope) * 2
        curve = [low, top / slope, high]
        series.append(Series("roof", Look(None, line=True, marks=False), curve, [min(top, slope * x) for x in curve]))
        note = f"roof: {top:,.0f} GFLOP/s, {slope:,.1f} GB/s\n{known[0].peaks_from}"
    x_title = "operations for each byte of weights, x and y, moved once"
    panel = Panel("Roofline", series, x_title, "GFLOP/s of the matrix products", note=note)
    caption = (
        "How far each problem is from what the machine can do at most. Labels are cell H/B/T; a t is a training step."
    )
    return Chart(name, caption, [panel])


def short(row: Row) -> str:
    return f"{CELL_NAMES[row.cell].split()[0]} {row.H}/{row.B}/{row.T}{' t' if row.mode == 'train' else ''}"


def _free(placed: list[tuple[float, float]], x: float, y: float, text: str) -> str:
    """``text`` where no other label stands near, in the decades of both axes; else ""."""
    at = math.log10(x), math.log10(y)
    if any(abs(at[0] - a) < 0.45 and abs(at[1] - b) < 0.09 for a, b in placed):
        return ""
    placed.append(at)
    return text


def peaks(rows: list[Row], name: str) -> Chart:
    """A line for each problem, a dot for each provider."""
    value = lambda r: (r.peak_bytes / 2**20, None, None)
    title = lambda r: titled(r.problem)
    largest = defaultdict(int)
    for row in rows:
        largest[title(row)] = max(largest[title(row)], row.peak_bytes)
    order = sorted(largest, key=largest.get, reverse=True)
    series = _dots([r for r in rows if r.peak_bytes], value, title, looks(rows))
    panel = Panel(MODE_NAMES["memory"], series, "MiB", rows=order)
    return Chart(
        name,
        f"The most memory that a training step holds at a time, above what it held before ({rows[0].how}).",
        [panel],
    )


def write_comparison(first: list[Row], second: list[Row], names: list[str], folder: Path) -> tuple[list[str], Path]:
    """(lines for the console, compare.html): what both files hold, the time of A by the time of B.

    Raises:
        ValueError: they have no problem and provider in common.
    """
    place = lambda row: (row.suite, row.problem, row.mode, row.provider)
    # Of a file with several commits the last row counts.
    tables = [{place(r): r for r in rows if r.status == "ok" and r.median is not None} for rows in (first, second)]
    pairs = [(a, tables[1][key]) for key, a in tables[0].items() if key in tables[1]]
    if not pairs:
        raise ValueError(f"{names[0]} and {names[1]} have no problem, mode and provider in common that was timed")
    lines, cells, dots = [], [], []
    lines.append(f"{'problem':<46}{'provider':<26}{'A':>12}{'B':>12}{'A / B':>9}   as fast as torch.nn: A, B")
    for a, b in pairs:
        quotient, spoiled = a.median / b.median, a.spoiled or b.spoiled
        own = ["" if r.provider == BASELINE or r.speedup is None else f"{r.speedup:.2f}" for r in (a, b)]
        words = f"{label(a):<46}{a.provider:<26}{a.median * 1e3:>9.3f} ms{b.median * 1e3:>9.3f} ms{quotient:>9.2f}"
        lines.append(f"{words}   {', '.join(filter(None, own))}{'  SPOILED' if spoiled else ''}")
        low, high = a.quartile1 / b.quartile3, a.quartile3 / b.quartile1
        dots.append((a, quotient, low, high, spoiled))
        values = [f'<td data-value="{v}">{v:.3g}</td>' for v in (a.median * 1e3, b.median * 1e3, quotient)]
        kind = _words(f"spoiled: {spoiled}" if spoiled else "")
        cells.append(_line(label(a), _words(a.provider), *values, *(f"<td>{text}</td>" for text in own), kind))
    means = {}
    for provider in ordered(a for a, _ in pairs):
        kept = [q for a, q, _, _, spoiled in dots if a.provider == provider and not spoiled]
        if kept:
            means[provider] = (statistics.geometric_mean(kept), len(kept))
    sentences = [
        f"{p}: B is {m:.2f} times as fast as A in the geometric mean of {n} problems." for p, (m, n) in means.items()
    ]
    a, b = pairs[0]
    if a.device != b.device:
        sentences.append("The two machines differ: the ratios to torch.nn say more than the times.")
    lines = [f"A: {names[0]}: {about(a)}", f"B: {names[1]}: {about(b)}", "", *lines, "", *sentences]
    chart = compared([d for d in dots if d[0].mode in TIMED])
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "compare.html"
    heads = ("problem", "provider ", "A, ms", "B, ms", "A / B", "A over torch.nn", "B over torch.nn", "why")
    result = "".join(f"<p>{html.escape(text)}</p>" for text in sentences)
    body = (
        f'<div class="result">{result}</div><p>A is {html.escape(names[0])}: {html.escape(about(a))}.<br>B is '
        f"{html.escape(names[1])}: {html.escape(about(b))}.</p>{figures([chart], folder)}"
        f"{_table('Times in milliseconds; A / B above 1: B is faster', heads, cells, sorts=True)}<p>{LETTERS}</p>"
    )
    page.write_text(document("fusedrnn: two runs compared", body))
    return lines, page


def about(row: Row) -> str:
    version = f"fusedrnn {row.fusedrnn} ({row.commit}), torch {row.torch}"
    return f"{version}, {row.threads} threads of {row.device}, {row.time[:10]}"


def compared(dots: list[tuple]) -> Chart:
    rows = [dot[0] for dot in dots]
    series = []
    for provider, look in looks(rows).items():
        for hollow in (False, True):
            own = [d for d in dots if d[0].provider == provider and bool(d[4]) == hollow]
            if own:
                found, x, low, high, _ = zip(*own)
                hover = [f"<b>{label(r)}</b><br>{provider}<br>A / B {q:.2f} ({a:.2f} to {b:.2f})" for r, q, a, b in
                         zip(found, x, low, high)]  # fmt: skip
                title = f"{provider}, spoiled" if hollow else provider
                series.append(
                    Series(
                        title, Look(look.number, hollow), list(x), list(map(label, found)), list(low), list(high), hover
                    )
                )
    mine = {label(d[0]): d[1] for d in sorted(dots, key=lambda d: d[0].provider == OURS)}
    order = sorted(mine, key=mine.get, reverse=True)
    panel = Panel("A by B", series, "A's time by B's →", rows=order, line_at=1.0)
    return Chart("compare", "Right of the line B is faster than A. Bars go from quartile to quartile of both.", [panel])
