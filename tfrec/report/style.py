"""Style: the page's CSS. Colours follow the reader's choice of light or dark."""

CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --card: #f5f7fa; --line: #dde3ea;
  --accent: #2f6fed; --ours: #2f6fed14; --hit: #2fa37a26; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --paper: #12161c;
  --card: #1b212a; --line: #2c3440; --accent: #6ea0ff; --ours: #6ea0ff1c; --hit: #2fa37a40; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 48px 0 12px; padding-bottom: 6px;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 16px; margin: 20px 0 6px; }
h4 { font-size: 13px; margin: 8px 0 4px; color: var(--soft); }
.over, .note, figcaption, dd, small { color: var(--soft); }
.over, .note, figcaption, details { font-size: 13px; }
.over { margin: 2px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px;
  margin-top: 20px; }
.tile { background: var(--card); border-radius: 10px; padding: 14px 16px; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.tile b { font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.findings { padding: 12px 16px 12px 32px; margin: 0 0 16px; background: var(--card);
  border-left: 3px solid var(--accent); border-radius: 0 8px 8px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 8px 0; }
th { font-size: 12px; font-weight: 600; color: var(--soft); text-align: right; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
td { text-align: right; }
th:first-child, td:first-child, .prose td, .prose th, .pairs td { text-align: left; }
.prose td { white-space: normal; font-size: 13px; }
.prose td:first-child { white-space: nowrap; }
.pairs, .narrow { width: auto; } .narrow th { padding-left: 24px; } .pairs thead { display: none; }
.pairs td:first-child { color: var(--soft); }
td small { display: block; font-size: 11px; }
tr.ours { background: var(--ours); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
figure { margin: 16px 0; } svg { width: 100%; height: auto; max-height: 460px; display: block; }
svg text { font-family: inherit !important; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 8px 0; }
dt { font-weight: 600; } dd { margin: 0; }
.example { background: var(--card); border-radius: 10px; padding: 4px 20px 16px; margin: 12px 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 20px; }
.columns ul, .columns ol { margin: 0; padding-left: 22px; font-size: 14px; }
.hit { background: var(--hit); border-radius: 4px; font-weight: 600; }
pre { background: var(--card); padding: 12px; border-radius: 8px; overflow-x: auto;
  font-size: 12px; }
@media print { details { display: none; } section { break-inside: avoid; } }
"""
