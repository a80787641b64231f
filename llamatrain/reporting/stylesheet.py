"""How the page looks: one column on a phone, up to three of plots on a screen; printable."""

STYLESHEET = """
:root { color-scheme: light; --ink: #1f2933; --pale: #616e7c; --line: #e4e7eb; --card: #fff; --ground: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header { max-width: 1280px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
h3 { font-size: .95rem; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; }
a { color: inherit; }
.pale, figcaption, .absent p { color: var(--pale); font-size: .85rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 0; font-size: .9rem; }
nav a { color: var(--pale); text-decoration: none; }
nav a:hover { color: var(--ink); text-decoration: underline; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; padding: 0; list-style: none; }
.key li, td.run, th.run { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 3px; margin-right: .45em; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 10px; margin: 18px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; min-width: 0; }
.tile b { display: block; font-size: 1.25rem; font-weight: 650; overflow-wrap: anywhere; }
.tile span { color: var(--pale); font-size: .8rem; }
.tile b + span { display: block; overflow-wrap: anywhere; }
.reason { margin: 12px 0 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px; }
figure, .absent, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: 12px; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; stroke-linejoin: round; }
figure.wide { grid-column: 1 / -1; }
figcaption { margin-top: 4px; }
.absent { border-style: dashed; background: none; align-self: start; }
.on-phones { display: none !important; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 12px 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { color: var(--pale); font-weight: 600; }
th:first-child, td:first-child, .texts td, .texts th { text-align: left; font-weight: 400; }
.texts td { white-space: normal; overflow-wrap: anywhere; min-width: 130px; max-width: 420px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px;
  margin-bottom: 10px; }
details .scroll { border: 0; margin: 8px 0 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; font: .8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 10px 0 0; }
.written { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo,
  Consolas, monospace; margin: 0; padding: 8px 0; max-height: 18em; overflow-y: auto;
  border-top: 1px solid var(--line); }
.written i { color: var(--pale); font-style: normal; }
.written .at { display: block; font-family: system-ui, sans-serif; font-size: .75rem; color: var(--pale); }
.written:first-child { border-top: 0; }
.samples { display: grid; align-items: start; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
footer { margin: 40px 0 32px; }
@media (max-width: 700px) {
  .on-phones { display: block !important; }
  .on-screens { display: none !important; }
  header { padding-top: 18px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  figure, .absent, .card { padding: 10px 8px; }
  th, td { white-space: normal; padding: 6px 7px; }
  .texts td { min-width: 98px; }
}
@media print { body { background: none; } figure, .tile, .scroll { break-inside: avoid; } nav { display: none; } }
"""
