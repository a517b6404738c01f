"""What those who read a video tell whoever watches over them: nobody, unless they run in a process of their own (see `worker`)."""


def alive() -> None:
    """A step forward: a frame was decoded, a packet found. Who takes none for long is taken to hang."""


def pixels(count: int) -> None:
    """How large a picture is: what memory it takes to decode such pictures."""
