"""Faults that tests plant into the code of requests; it travels to the engine's processes by its source."""


def doubled(terms, states, positions):
    """`in_replaced` that writes other states than it is given."""
    terms[0][positions] = 2 * states[positions]  # LayerNorm would hide a constant
    for term in terms[1:]:
        term[positions] = 0


def without_effect(terms, states, positions):
    """`in_replaced` that writes nothing."""
