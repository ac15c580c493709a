"""The style sheet of a report: light, one column of 1120 px, numbers in tabular figures, no outside fonts."""

CSS = """
:root { --ink:#1f2933; --muted:#66727f; --line:#e3e8ed; --soft:#f6f8fa; --blue:#2458b3; }
* { box-sizing:border-box; }
body { margin:0; background:#fff; color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI","Helvetica Neue",
  Arial,sans-serif; font-variant-numeric:tabular-nums; }
main { max-width:1168px; margin:0 auto; padding:40px 24px 72px; }
h1 { font-size:34px; line-height:1.15; letter-spacing:-.02em; margin:2px 0 10px; overflow-wrap:anywhere; }
h2 { font-size:18px; letter-spacing:-.01em; margin:0 0 12px; }
h3 { font-size:15px; margin:0 0 6px; }
p { margin:0; }
section { margin-top:40px; }
.kicker { color:var(--muted); font-size:13px; letter-spacing:.02em; }
.lead { font-size:19px; max-width:56em; }
.identity { color:var(--muted); font-size:13px; margin-top:10px; overflow-wrap:anywhere; }
.note, figcaption { color:var(--muted); font-size:13px; }
.missing { color:var(--muted); font-style:italic; }
.tiles { display:grid; grid-template-columns:repeat(4,1fr); gap:16px; margin-top:28px; }
.tile { background:var(--soft); border-radius:8px; padding:16px 18px; display:flex; flex-direction:column; }
.tile .label { color:var(--muted); font-size:13px; }
.tile .value { font-size:30px; font-weight:600; letter-spacing:-.02em; line-height:1.25; }
.tile .value.missing { font-size:18px; font-weight:400; line-height:2; }
.tile .note { min-height:1.5em; }
.pair { display:grid; grid-template-columns:minmax(0,1.25fr) minmax(0,1fr); gap:48px; }
.grid { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:36px 48px; }
figure { margin:0; }
figure img { display:block; width:100%; height:auto; }
figcaption { margin-top:4px; max-width:80em; }
table { border-collapse:collapse; width:100%; font-size:14px; }
th { font-weight:400; text-align:left; }
td, th { padding:6px 0; border-bottom:1px solid var(--line); vertical-align:top; }
thead th { color:var(--muted); font-size:13px; }
.results td, .results thead th { text-align:right; padding-left:14px; white-space:nowrap; }
.results thead th:first-child { text-align:left; padding-left:0; }
.results .own th, .results .own td { font-weight:600; }
.results + .note { margin-top:8px; }
.facts th { color:var(--muted); width:38%; padding-right:16px; }
.facts td { overflow-wrap:anywhere; }
.sources td, .sources th { padding-right:20px; }
.sources .n { text-align:right; padding-right:0; padding-left:20px; white-space:nowrap; }
.sources tbody tr:last-child > * { font-weight:600; border-bottom:0; }
.sample { margin-top:14px; }
pre { margin:0; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap; overflow-wrap:anywhere; background:var(--soft); border-radius:8px; padding:14px 18px;
  tab-size:4; }
.prompt { color:var(--muted); }
.continuation { background:#dfe9f8; color:var(--ink); border-radius:3px; }
.sample .note { margin-top:4px; }
summary { cursor:pointer; color:var(--blue); margin-bottom:10px; }
@media (max-width:860px) { .tiles { grid-template-columns:repeat(2,1fr); } .pair, .grid { grid-template-columns:1fr; } }
@media print { main { padding:0; } section { break-inside:avoid; } }
"""
