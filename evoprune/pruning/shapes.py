"""Grids that whole units allow, shared by the methods that a shape binds. No torch."""


def smaller_frame(height: int, width: int, most: int) -> tuple[int, int]:
    """The largest frame of at most `most` units whose shape is that of height x width, as near as whole units come.

    Each frame looked at has one side of a whole number of units and the other rounded, down or up, from the ratio. Among frames
    of equally many units the one nearest to the ratio wins, then the lower one. At least 1x1.
    """
    sizes = {(1, 1)}
    for rows in range(1, height + 1):
        sizes |= {(rows, max(1, rows * width // height)), (rows, -(-rows * width // height))}
    for columns in range(1, width + 1):
        sizes |= {(max(1, columns * height // width), columns), (-(-columns * height // width), columns)}
    fitting = [(h, w) for h, w in sizes if h * w <= most or (h, w) == (1, 1)]

    def rank(size: tuple[int, int]) -> tuple[float, ...]:
        h, w = size
        stretch = max(h * width, w * height) / min(h * width, w * height)
        return -h * w, stretch, h

    return min(fitting, key=rank)
