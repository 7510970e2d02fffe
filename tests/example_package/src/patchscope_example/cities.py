"""A reader of data."""


def cities(n=3):
    """The first n cities."""
    names = ("The Eiffel Tower is in", "The Colosseum is in", "The Prado is in", "Big Ben is in")
    return [{"text": name} for name in names[:n]]
