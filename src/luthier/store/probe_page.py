"""The page of probes: what each of them says, its tables and its pictures, in one file that loads nothing.

Idea: like the report of a run it is a view of plain values; what was left out or could not be measured is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from luthier.store import pictures

PAGE: Final = "probes.html"
_STYLE: Final = """
:root{--paper:#fdfcf9;--sheet:#f6f3ec;--ink:#26221c;--soft:#6f675b;--rule:#e3ddd1;--c0:#46657f;--c1:#a8481a;
--c2:#3f7048;--c3:#7a4f86;--c4:#8a6d1d;--c5:#5d6b70;--more:#a8481a;--less:#46657f;--cell:#efeae0;--strong:#fff;
--serif:Charter,"Bitstream Charter","Iowan Old Style","Palatino Linotype","Liberation Serif",Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",sans-serif}
@media(prefers-color-scheme:dark){:root{--paper:#171512;--sheet:#201d19;--ink:#e9e3d8;--soft:#a1978a;--rule:#37322b;
--c0:#8fb3d1;--c1:#e8935a;--c2:#8bc295;--c3:#c39bd0;--c4:#d3b45c;--c5:#a5b1b6;--more:#e8935a;--less:#8fb3d1;
--cell:#26221d;--strong:#171512}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans)}
main{max-width:64rem;margin:0 auto;padding:3rem 1.5rem 5rem}
h1{font:400 clamp(1.55rem,3.6vw,2.2rem)/1.28 var(--serif);margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font:400 1.4rem/1.3 var(--serif);margin:3.2rem 0 .4rem;padding-top:1.2rem;border-top:1px solid var(--rule)}
h3{font-size:.875rem;font-weight:600;margin:1.6rem 0 .3rem}p{margin:.4rem 0;max-width:46rem}
.about,.hint,.out{color:var(--soft);font-size:.875rem}.hint{font-size:.8125rem;margin:.1rem 0 .3rem}
.said{font:1.0625rem/1.5 var(--serif)}
.short{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.6rem;margin:1.8rem 0 0;max-width:54rem}
.short dd{margin:0;font:1rem/1.5 var(--serif)}.short a{color:var(--soft);font-size:.875rem;text-underline-offset:.2em}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));
gap:.4rem 2.4rem;align-items:start}figure{margin:0;min-width:0;overflow-x:auto}
svg{display:block;width:100%;height:auto}
svg text{font:10px var(--sans);fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:1.75;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}
.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}
.cells text{fill:var(--ink)}
.none{fill:var(--cell)}.more{fill:var(--more)}.less{fill:var(--less)}svg text.strong{fill:var(--strong)}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.8125rem;color:var(--soft);margin:.2rem 0}
.key span::before{content:"";display:inline-block;width:1.1rem;margin-right:.45rem;vertical-align:.28em;
border-top:2px solid var(--c0)}.key .c1::before{border-color:var(--c1)}.key .c2::before{border-color:var(--c2)}
.key .c3::before{border-color:var(--c3)}.key .c4::before{border-color:var(--c4)}.key .c5::before{border-color:var(--c5)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:24rem}
th{text-align:right;font-weight:400;color:var(--soft);font-size:.8125rem;vertical-align:bottom}
th,td{padding:.32rem 0 .32rem 1.4rem;border-bottom:1px solid var(--rule);text-align:right}
th:first-child,td:first-child,td.text,th.text{text-align:left}th:first-child,td:first-child{padding-left:0}
"""


def page(
    title: str, about: str, reports: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str] | None = None
) -> str:
    """The page as text."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light '
        'dark"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        f"<title>{escape(title)} · probes</title><style>{_STYLE}</style><main><h1>What tuning did: {escape(title)}</h1>"
        f'<p class="about">{escape(about)}</p>'
    ]
    # What could not be measured comes last: there is nothing to see.
    ordered = sorted(reports.items(), key=lambda one: not _measured(one[1]))
    parts += [_in_short([(name, report) for name, report in ordered if _measured(report) and report["verdict"]])]
    parts += [_section(name, report) for name, report in ordered]
    for name, why in (left_out or {}).items():
        parts.append(f'<p class="out">Left out: {escape(name)} ({escape(why)})</p>')
    return "".join(parts) + "</main></html>\n"


def _measured(report: Mapping[str, Any]) -> bool:
    return bool(report.get("measured", True))


def _in_short(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The first sentence of each, with the way to the rest of it; nothing of one alone."""
    if len(reports) < 2:
        return ""
    rows = "".join(
        f'<dt><a href="#{escape(name)}">{escape(_heading(name))}</a></dt><dd>{escape(str(report["verdict"][0]))}</dd>'
        for name, report in reports
    )
    return f'<dl class="short">{rows}</dl>'


def _heading(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _section(name: str, report: Mapping[str, Any]) -> str:
    said = "".join(f'<p class="said">{escape(str(sentence))}</p>' for sentence in report["verdict"])
    drawn = [pictures.curves(one) for one in report["curves"]] + [pictures.grid(one) for one in report["grids"]]
    shown = f'<div class="pictures">{"".join(drawn)}</div>' if any(drawn) else ""
    tables = "".join(_table(one) for one in report["tables"])
    return f'<section id="{escape(name)}"><h2>{escape(_heading(name))}</h2>{said}{shown}{tables}</section>'


def _table(table: Mapping[str, Any]) -> str:
    texts = [any(isinstance(row[place], str) for row in table["rows"]) for place in range(len(table["heads"]))]
    kinds = [' class="text"' if text else "" for text in texts]
    heads = "".join(f"<th{kind}>{escape(str(head))}</th>" for kind, head in zip(kinds, table["heads"], strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(value_text(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>" for row in table["rows"]
    )  # fmt: skip
    title = escape(str(table["title"]))
    return f'<h3>{title}</h3><div class="wide"><table><tr>{heads}</tr>{rows}</table></div>'


def value_text(value: Any) -> str:
    """A cell of a table: whole numbers whole, others with four digits, nothing where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
