"""`index.html`, readable with nothing beside it on a screen or a phone, and `report.md` with its pictures beside it."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from specstop.figures.pair import PAIR
from specstop.figures.recipe import ORIGINS, Data, origins
from specstop.figures.summary import COLUMNS, rows
from specstop.output import write_file

__all__ = ["write_pages"]

TITLE = "SpecDec++ again: published, predicted, measured"
HEADS = {"published": "published", "predicted": "predicted", "replayed": "replayed", "live": "live"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfc; --soft: #666; --line: #ddd; --card: #f4f4f1;
        --link: #0a5a94; --bad: #a33c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --paper: #17181a; --soft: #a5a29b; --line: #3a3b3e;
        --card: #212326; --link: #7cbcf0; --bad: #f0a36b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 4rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav { columns: 15rem; font-size: .9rem; margin: 1rem 0; }
nav a { display: block; padding: .12rem 0; text-decoration: none; }
p.caption { font-size: .92rem; margin: .5rem 0; }
p.files, dl { font-size: .85rem; color: var(--soft); }
dt { font-weight: 600; float: left; clear: left; width: 6.2rem; } dd { margin: 0 0 .2rem 6.4rem; }
.scroll { overflow-x: auto; border-radius: 6px; }
.sheet { background: #fff; padding: .5rem; border: 1px solid var(--line); }
.sheet img { display: block; width: 100%; min-width: 40rem; height: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; border-bottom: 2px solid var(--line); padding: .35rem .6rem .35rem 0; position: sticky; top: 0;
     background: var(--paper); }
td { padding: .22rem .6rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th[scope=rowgroup] { border-bottom: 1px solid var(--line); font-weight: 600; padding-top: .9rem; position: static; }
td small { color: var(--soft); white-space: nowrap; margin-left: .45rem; }
.missed { color: var(--bad); font-weight: 600; } .fitted { color: var(--soft); font-style: italic; }
.badge { display: inline-block; font-size: .75rem; padding: 0 .45rem; margin-right: .3rem;
         border: 1px solid var(--line); border-radius: 1rem; color: var(--soft); background: var(--card); }
.hint { display: none; font-size: .8rem; color: var(--soft); margin: .2rem 0; }
@media (max-width: 40rem) { body { padding: .8rem .7rem 3rem; } .hint, td small { display: block; margin: 0; } }
"""


def write_pages(out: Path, made: Sequence[Data], missing: Sequence[Mapping[str, str]]) -> None:
    """Both pages; `missing` are figures that could not be made, and why."""
    write_file(out / "report.md", _markdown(made, missing))
    write_file(out / "index.html", _html(out, made, missing))


def _opening(made: Sequence[Data]) -> str:
    quick = any(data["quick"] for data in made)
    pair = next((data["about"]["pair"] for data in made if "pair" in data["about"]), None)
    text = (
        "Each figure and table of SpecDec++ (arXiv 2405.19715), and what theory and a real pair add to it: published "
        "values, the theory's prediction and the measurement side by side, each labelled for what it is."
    )
    if pair:
        text += (
            f" The real pair is {pair['label']}: {pair['num_requests']} requests, {pair['num_positions']:,} tokens, "
            "recorded once, with rules fitted on one half of the requests and scored on the other."
        )
    if quick:
        text += " **Made with --quick: small sizes, to try the command; the full run's numbers are other ones.**"
    return text


def _cell_text(cell: Data | None) -> tuple[str, str, str]:
    """Value, what stands below it, and its class."""
    if cell is None:
        return "", "", ""
    value = f"{cell['value']:.3f}"
    if cell["column"] == "published":
        value = f"{cell['value']:.4g}"
        if cell["origin"] == "derived":
            return f"[{value}]", "derived", ""
        return value, str(cell["tag"]), ""
    if cell["declared"]:
        return value, "declared", "fitted"
    if cell["fitted"]:
        return value, "fitted", "fitted"
    span = "" if cell["low"] is None else f"{cell['low']:.3f} to {cell['high']:.3f}"
    if cell["within"] is False:
        return value, f"{span}, missed", "missed"
    return value, span, ""


def _label(pair: str, made_by: Data) -> str:
    return made_by["about"]["pair"]["label"] if pair == PAIR else pair


def _html_table(data: Data) -> str:
    lines = ["<div class='scroll'><table><thead><tr><th scope=col>pair</th>"]
    lines += [f"<th scope=col>{HEADS[name]}</th>" for name in COLUMNS]
    lines.append("</tr></thead><tbody>")
    quantity = None
    for row in rows(data):
        if row["quantity"] != quantity:
            quantity = row["quantity"]
            lines.append(f"<tr><th scope=rowgroup colspan={1 + len(COLUMNS)}>{html.escape(quantity)}</th></tr>")
        lines.append(f"<tr><td>{html.escape(_label(row['pair'], data))}</td>")
        for name in COLUMNS:
            value, below, kind = _cell_text(row[name])
            title = html.escape(str((row[name] or {}).get("source") or ""))
            shown = f"{html.escape(value)}<small>{html.escape(below)}</small>"
            lines.append(f"<td class='{kind}' title='{title}'>{shown}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _inline(text: str) -> str:
    """The little Markdown that captions use, as HTML."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def _html(out: Path, made: Sequence[Data], missing: Sequence[Mapping[str, str]]) -> str:
    parts = [
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{TITLE}</title>",
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}</style></head><body>",
        f"<h1>{TITLE}</h1><p>{_inline(_opening(made))}</p><dl>",
        *(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in ORIGINS.items()),
        "</dl><nav>",
        *(f"<a href='#{data['name']}'>{html.escape(data['title'])}</a>" for data in made),
        "</nav>",
    ]
    for data in made:
        name = data["name"]
        parts.append(f"<section id={name}><h2>{html.escape(data['title'])}</h2>")
        parts.append("".join(f"<span class=badge>{origin}</span>" for origin in origins(data)))
        if name == "summary":
            parts.append(_html_table(data))
        else:
            source = base64.b64encode((out / f"{name}.svg").read_bytes()).decode()
            alt = html.escape(f"{data['title']}; numbers in {name}.csv")
            parts.append("<span class=hint>Scroll the figure sideways, or tap a file below.</span>")
            parts.append(f"<div class='scroll sheet'><img alt='{alt}' src='data:image/svg+xml;base64,{source}'></div>")
        files = " ".join(f"<a href='{name}.{kind}'>{kind.upper()}</a>" for kind in ("pdf", "svg", "png", "csv", "json"))
        parts.append(f"<p class=caption>{_inline(data['caption'])}</p><p class=files>{files}</p></section>")
    if missing:
        parts.append("<section><h2>Not made</h2>")
        parts += [f"<p class=caption><strong>{html.escape(row['title'])}</strong>: {html.escape(row['why'])}</p>"
                  for row in missing]  # fmt: skip
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>\n"])


def _markdown(made: Sequence[Data], missing: Sequence[Mapping[str, str]]) -> str:
    parts = [f"# {TITLE}", _opening(made), "\n".join(f"- *{name}*: {said}" for name, said in ORIGINS.items())]
    for data in made:
        name = data["name"]
        parts.append(f"## {data['title']}")
        parts.append(_markdown_table(data) if name == "summary" else f"![{data['title']}]({name}.png)")
        files = ", ".join(f"[{kind.upper()}]({name}.{kind})" for kind in ("pdf", "svg", "csv", "json"))
        parts.append(f"{data['caption']} ({', '.join(origins(data))}; {files})")
    if missing:
        parts.append("## Not made")
        parts.append("\n".join(f"- {row['title']}: {row['why']}" for row in missing))
    return "\n\n".join(parts) + "\n"


def _markdown_table(data: Data) -> str:
    lines = ["| quantity | pair | " + " | ".join(HEADS[name] for name in COLUMNS) + " |",
             "|---|---|" + "---|" * len(COLUMNS)]  # fmt: skip
    for row in rows(data):
        cells = []
        for name in COLUMNS:
            value, below, _ = _cell_text(row[name])
            cells.append(f"{value} ({below})" if below else value)
        lines.append("| " + " | ".join((row["quantity"], _label(row["pair"], data), *cells)) + " |")
    return "\n".join(lines)
