"""What those who read a video tell whoever watches over them: nobody, unless they run in a process of their own (`worker`)."""

from collections.abc import Callable

# A step forward: a frame was decoded, a packet found. Who takes none for long is taken to hang.
alive: Callable[[], None] = lambda: None  # noqa: E731
# Pictures have so many pixels: how much memory decoding them may take.
pixels: Callable[[int], None] = lambda count: None  # noqa: E731
