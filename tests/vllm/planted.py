"""Faults that tests plant into the code of requests; it travels to the engine's processes by its source."""


def shifted(terms, states, positions):
    """`in_replaced` that writes other states than it is given."""
    terms[0][positions] = states[positions] + 1
    for term in terms[1:]:
        term[positions] = 0


def without_effect(terms, states, positions):
    """`in_replaced` that writes nothing."""
