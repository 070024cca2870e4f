"""`tokenprune app`: placeholder."""


def app() -> None:
    """A page."""
