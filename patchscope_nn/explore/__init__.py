"""The explorer: a local page on which a prompt is asked, token by token and layer by layer.

    views.py    what the page asks, as a recipe
    lenses.py   the next-token Patchscopes that the grid can be read with
    copies.py   a recipe as YAML and as Python that run as they are
    worker.py   one thread that does all model work, and who waits for it
    answers.py  the recipes run, and told of as they run
    guard.py    who may ask: the token, Host, Origin and size of every request
    server.py   the routes, and serving them on loopback
    page/       the page itself: plain JavaScript and CSS

The page is told of a request as it runs: each answer is a stream of JSON lines, whose end is `done` or
`error`. A request that is dropped is cancelled.
"""
