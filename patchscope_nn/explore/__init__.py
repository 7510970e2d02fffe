"""The explorer: a local page that shows what the hidden states of a prompt hold, by token and layer.

    views.py    the page's requests, checked, and the recipes that answer them
    lenses.py   the next-token Patchscopes with which a grid can be read
    copies.py   a recipe as YAML and as Python, ready to run
    worker.py   the thread that does all model work, and the queue before it
    answers.py  run the recipes and report their progress
    guard.py    access control: the token, Host, Origin and size of every request
    server.py   the routes, and serving them on loopback
    page/       the page: plain JavaScript and CSS

Each answer is a stream of JSON lines with events, and ends with the event `done` or `error`. A request whose
connection is closed is cancelled.
"""
