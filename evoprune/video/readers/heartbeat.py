"""How readers report that they are alive. In the sandbox, `worker` replaces these functions; elsewhere they do nothing."""


def alive() -> None:
    """Called after each step: a decoded frame, a packet. A reader that stays silent for long counts as hung."""


def picture_size(pixels: int) -> None:
    """Called with the number of pixels in a picture before pictures of that size are decoded: memory depends on it."""
