"""Frame sizes in whole units, shared by the methods that make frames smaller. No torch."""


def smaller_frame(height: int, width: int, most: int) -> tuple[int, int]:
    """(height, width) of the largest frame of at most `most` units, at least 1 x 1, with nearly the ratio of height x width.

    One dimension is any whole number of units; the ratio gives the other, rounded. Of equals the nearest to the ratio wins.
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
