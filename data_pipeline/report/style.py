"""The page's style sheet: one column, light or dark as the reader has it, no outside fonts."""

CSS = """
:root { color-scheme:light dark; --page:#fff; --ink:#1f2933; --muted:#5b6774; --line:#e3e8ed; --soft:#f5f7f9;
  --kept:#2458b3; --gone:#c2410c; --later:#a9a4b8; --tick:#1f2933; --del:#fbdfd3; --ins:#d5e6fb; --hot:#b4350a; }
@media (prefers-color-scheme:dark) { :root { --page:#13171c; --ink:#e4e9ee; --muted:#9aa7b4; --line:#2a323b;
  --soft:#1b2128; --kept:#6d9df0; --gone:#f08a5d; --later:#6f6a80; --tick:#e4e9ee; --del:#5b2b1a; --ins:#1d3f66;
  --hot:#ff9d70; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",
  "Helvetica Neue",Arial,sans-serif; font-variant-numeric:tabular-nums; }
main { max-width:1128px; margin:0 auto; padding:36px 24px 72px; }
h1 { font-size:34px; line-height:1.15; letter-spacing:-.02em; margin:2px 0 10px; overflow-wrap:anywhere; }
h2 { font-size:20px; letter-spacing:-.01em; margin:0 0 4px; }
h3 { font-size:15px; margin:22px 0 6px; }
p { margin:0; }
a { color:var(--kept); text-decoration:none; }
a:hover, a:focus-visible { text-decoration:underline; }
section { margin-top:48px; scroll-margin-top:12px; }
.kicker, .note, .identity, .legend { color:var(--muted); font-size:13px; }
.lead { font-size:19px; max-width:54em; }
.identity { margin-top:10px; overflow-wrap:anywhere; }
.note { max-width:62em; margin-bottom:12px; }
nav { display:flex; flex-wrap:wrap; gap:4px 18px; margin-top:18px; padding-top:12px; border-top:1px solid var(--line);
  font-size:14px; }
.tiles { display:grid; grid-template-columns:repeat(4,1fr); gap:14px; margin-top:26px; }
.tile { background:var(--soft); border-radius:8px; padding:14px 16px; display:flex; flex-direction:column; }
.tile span { color:var(--muted); font-size:13px; }
.tile strong { font-size:28px; font-weight:600; letter-spacing:-.02em; line-height:1.3; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14px; }
th { font-weight:400; text-align:left; }
td, tbody th { padding:5px 14px 5px 0; border-bottom:1px solid var(--line); vertical-align:top; }
thead th { color:var(--muted); font-size:13px; padding:0 14px 5px 0; border-bottom:1px solid var(--line);
  vertical-align:bottom; }
td:last-child, th:last-child { padding-right:0; }
.n { text-align:right; white-space:nowrap; }
.bar { display:block; position:relative; min-width:70px; height:12px; margin-top:5px; background:var(--soft);
  border-radius:2px; }
.bar b { display:block; height:100%; background:var(--kept); border-radius:2px; }
.bar i { position:absolute; top:-3px; bottom:-3px; width:2px; margin-left:-1px; background:var(--tick); }
td:has(> .bar) { width:18%; } .sources td:has(> .bar) { width:9%; }
.narrow { max-width:560px; }
.mix .bar { min-width:64px; height:7px; margin-top:2px; } .mix td:has(> .bar) { width:auto; }
.tasks td:first-child, .tasks th, .tasks td:nth-child(3) { white-space:nowrap; }
.mix small { color:var(--muted); white-space:nowrap; }
.hot, .mix small.hot { color:var(--hot); font-weight:600; }
.funnel td:nth-child(2) { width:38%; }
.flow { display:flex; height:18px; margin-top:3px; background:var(--soft); border-radius:3px; overflow:hidden; }
.flow b { background:var(--kept); }
.flow u { background:repeating-linear-gradient(135deg,var(--gone) 0 4px,color-mix(in srgb,var(--gone) 55%,var(--page))
  4px 7px); }
.flow b.second { background:color-mix(in srgb,var(--kept) 45%,var(--page)); }
figure { margin:8px 0 0; }
svg { display:block; width:100%; height:auto; }
svg text { fill:var(--muted); font-size:11.5px; }
svg .grid { stroke:var(--line); } svg .axis { stroke:var(--muted); }
svg line.mark { stroke:var(--ink); stroke-dasharray:3 3; } svg text.mark { fill:var(--ink); }
rect.kept { fill:var(--kept); } rect.gone { fill:var(--gone); } rect.later { fill:var(--later); }
.legend { display:flex; flex-wrap:wrap; gap:2px 18px; }
.legend i { display:inline-block; width:11px; height:11px; margin-right:6px; border-radius:2px; }
.legend .kept { background:var(--kept); } .legend .gone { background:var(--gone); }
.legend .later { background:var(--later); }
.two { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:0 40px; }
.three { display:grid; grid-template-columns:repeat(3,minmax(0,1fr)); gap:0 28px; }
.three svg text { font-size:16px; }
.sides { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:12px; margin:6px 0 18px; }
.sides p { font-size:13px; color:var(--muted); overflow-wrap:anywhere; margin-bottom:4px; }
pre { margin:0; font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap; overflow-wrap:anywhere; background:var(--soft); border-radius:6px; padding:10px 14px;
  tab-size:4; max-height:22em; overflow:auto; }
del { background:var(--del); } ins { background:var(--ins); }
.quote { display:grid; grid-template-columns:13em minmax(0,1fr); gap:12px; margin:8px 0; font-size:13px; }
.quote pre { max-height:8.2em; }
details { margin-top:8px; }
summary { cursor:pointer; padding:3px 0; font-size:14px; }
summary b { font-weight:600; }
code { font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere; }
@media (max-width:860px) { .tiles { grid-template-columns:repeat(2,1fr); } .two, .three, .sides, .quote
  { grid-template-columns:1fr; } }
@media print { main { padding:0; } nav { display:none; } pre { max-height:none; } }
"""
