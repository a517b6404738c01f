"""Words in pictures without a font library: letters of 5x9 dots, the last two rows of them below the line."""

import numpy as np

WIDTH, HEIGHT = 6, 10  # of a letter with the room around it, in dots
_ART = {
    "ABCDEFGHIJKLM": """
 ###  ####   ###  ####  ##### #####  ###  #   #  ###    ### #   # #     #   #
#   # #   # #   # #   # #     #     #   # #   #   #      #  #  #  #     ## ##
#   # #   # #     #   # #     #     #     #   #   #      #  # #   #     # # #
##### ####  #     #   # ####  ####  # ### #####   #      #  ##    #     # # #
#   # #   # #     #   # #     #     #   # #   #   #      #  # #   #     #   #
#   # #   # #   # #   # #     #     #   # #   #   #   #  #  #  #  #     #   #
#   # ####   ###  ####  ##### #      ###  #   #  ###   ##   #   # ##### #   #


""",
    "NOPQRSTUVWXYZ": """
#   #  ###  ####   ###  ####   #### ##### #   # #   # #   # #   # #   # #####
##  # #   # #   # #   # #   # #       #   #   # #   # #   # #   # #   #     #
##  # #   # #   # #   # #   # #       #   #   # #   # #   #  # #   # #     #
# # # #   # ####  #   # ####   ###    #   #   # #   # # # #   #     #     #
#  ## #   # #     # # # # #       #   #   #   # #   # # # #  # #    #    #
#  ## #   # #     #  #  #  #      #   #   #   #  # #  ## ## #   #   #   #
#   #  ###  #      ## # #   # ####    #    ###    #   #   # #   #   #   #####


""",
    "abcdefghijklm": """
      #               #         ##        #       #      #  #      ##
      #               #        #  #       #                 #       #
 ###  # ##   ###   ## #  ###   #     ## # # ##   ##     ##  #  #    #   ## #
    # ##  # #   # #  ## #   # ###   #  ## ##  #   #      #  # #     #   # # #
 #### #   # #     #   # #####  #    #   # #   #   #      #  ##      #   # # #
#   # ##  # #   # #  ## #      #    #  ## #   #   #      #  # #     #   # # #
 #### # ##   ###   ## #  ####  #     ## # #   #  ###     #  #  #   ###  # # #
                                        #             #  #
                                     ###               ##
""",
    "nopqrstuvwxyz": """
                                     #
                                     #
# ##   ###  # ##   ## # # ##   #### ####  #   # #   # #   # #   # #   # #####
##  # #   # ##  # #  ## ##  # #      #    #   # #   # #   #  # #  #   #    #
#   # #   # #   # #   # #      ###   #    #   # #   # # # #   #   #   #   #
#   # #   # ##  # #  ## #         #  #  # #  ##  # #  # # #  # #  #  ##  #
#   #  ###  # ##   ## # #     ####    ##   ## #   #    # #  #   #  ## # #####
            #         #                                               #
            #         #                                            ###
""",
    "0123456789": """
 ###    #    ###  #####    #  #####  ###  #####  ###   ###
#   #  ##   #   #     #   ##  #     #         # #   # #   #
#  ##   #       #    #   # #  ####  #        #  #   # #   #
# # #   #      #    ##  #  #      # ####    #    ###   ####
##  #   #     #       # #####     # #   #  #    #   #     #
#   #   #    #    #   #    #  #   # #   #  #    #   #    #
 ###   ###  #####  ###     #   ###   ###   #     ###   ##


""",
    ".,:;-_/()%=+": """
                                        #    #   #    ##  #
             ##    ##                   #   #     #   ##  #         #
             ##    ##                  #   #       #     #  #####   #
                        #####         #    #       #    #         #####
                                     #     #       #   #    #####   #
 ##    ##    ##    ##               #       #     #   #  ##         #
 ##    ##    ##    ##         ##### #        #   #    #  ##
        #           #
       #           #
""",
}


def _glyphs() -> dict[str, np.ndarray]:
    made = {" ": np.zeros((HEIGHT, WIDTH), bool)}
    for letters, art in _ART.items():
        rows = [row.ljust(len(letters) * WIDTH) for row in art.split("\n")[1:]]
        dots = np.array([[dot == "#" for dot in row] for row in rows])  # the last row is empty
        made |= zip(letters, np.split(dots, len(letters), axis=1), strict=True)
    return made


GLYPHS = _glyphs()
UNKNOWN = np.pad(np.ones((7, 5), bool), ((0, 3), (0, 1)))  # any other character


def text_mask(text: str, scale: int = 2) -> np.ndarray:
    """bool `[10 * scale, 6 * scale * len(text)]`: which pixels the letters of a line cover."""
    if not text:
        return np.zeros((HEIGHT * scale, 0), bool)
    line = np.concatenate([GLYPHS.get(letter, UNKNOWN) for letter in text], axis=1)
    return line.repeat(scale, 0).repeat(scale, 1)
