r"""`specstop figures`: every figure and table of the paper again, from results that are stored beside them.

A figure is a *recipe*: `compute` turns *sources* (shared results: the paper's predictions, a replayed trace, a live
run) into data, series of columns that each say where their numbers come from; `simulate.figures.draw` turns that data
into a picture; `caption` turns it into words. The data is what is kept: `NAME.json` beside `NAME.csv`, `NAME.pdf`,
`NAME.svg` and `NAME.png`. Drawing again needs no computing, and data is computed again only if what it is made from
has changed: the settings, the code it runs through, the trace (`store`).

    sources   results that several figures share
    store     where they are kept, and when they are too old
    published, theory, pair, heads, times: the recipes
    pages     index.html and report.md
    make      all of it, in order
"""
