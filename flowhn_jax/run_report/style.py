"""The page's style: light and dark, readable at the width of a phone.

The colours of lines are those of Okabe and Ito, which colour-blind readers can tell apart; in the
dark they are lighter.
"""

_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8579b", "#8a6d00", "#2b8fd0", "#5b5b5b", "#8c3b00")
_DARK = ("#56b4e9", "#ff8f3f", "#2fcf9f", "#e39fc8", "#f0e442", "#9fd3f5", "#c9c9c9", "#e69f00")


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f".c{number}{{color:{value}}}" for number, value in enumerate(values))


STYLE = f"""
:root{{color-scheme:light dark;--back:#fff;--text:#1f2328;--soft:#59636e;--rule:#d1d9e0;
--grid:#e8ecf0;--panel:#f6f8fa}}
{_colours(_LIGHT)}
@media (prefers-color-scheme:dark){{:root{{--back:#0d1117;--text:#e6edf3;--soft:#9198a1;
--rule:#3d444d;--grid:#252c35;--panel:#151b23}}
{_colours(_DARK)}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:76rem;margin:0 auto;padding:1rem}}
h1{{font-size:1.5rem;margin:.5rem 0}}
h2{{font-size:1.1rem;margin:2rem 0 .6rem}}
h3{{font-size:1rem;margin:1rem 0 .3rem}}
p{{margin:.3rem 0}}
.scrolling{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}}
th:first-child{{text-align:left;padding-left:0}}
thead th{{color:var(--soft);font-weight:600}}
tbody th{{font-weight:500}}
.figures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));
gap:1.5rem}}
figure{{margin:0;min-width:0}}
figcaption{{font-weight:600;font-size:.95rem;margin-bottom:.2rem}}
figure>svg{{display:block;width:100%;height:auto}}
text{{font-size:12px;fill:var(--soft)}}
.grid{{stroke:var(--grid)}}
.axis{{stroke:var(--soft)}}
.line{{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}}
.dot{{fill:currentColor}}
.band{{fill:currentColor;opacity:.2}}
.key{{width:28px;height:12px;margin-right:.45rem;vertical-align:-1px}}
.legend{{list-style:none;margin:.2rem 0 0;padding:0;font-size:.85rem;display:flex;flex-wrap:wrap;
gap:.1rem 1.1rem}}
pre{{background:var(--panel);padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
font-size:.85rem}}
em{{color:var(--soft)}}
"""
