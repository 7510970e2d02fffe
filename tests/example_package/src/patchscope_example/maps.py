"""A mapping."""


def halved(states):
    """States of half the norm."""
    return states / 2
