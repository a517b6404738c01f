"""What signs say, and how the characters look."""

from functools import lru_cache

import numpy as np

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LIST = """
ACE ACT AGE AIR ARM ART BAG BAR BAY BED BEE BOX BUS BUY CAB CAN CAP CAR CAT COD COW CUP DAY DOG DRY EAR EGG END EYE
FAN FAR FIG FIT FLY FOG FOX FUN GAP GAS GYM HAT HEN ICE INK JAM JAR JET JOB JOY KEY KID LAB LEG LIP MAP MUD NET NUT
OAK OIL OWL PAN PEN PIE PIG RAT SKY SUN TAX TEA TOY VAN WAX WEB WOK YAK ZIP ZOO BABY BACK BANK BARN BATH BEAR BELL
BIKE BIRD BOAT BONE BOOK BULB CAFE CAGE CAKE CAMP CARD CASH CAVE CLUB COAT COIN CORK CROW DECK DESK DISH DOCK DOOR
DUCK DUST EXIT FARM FILM FISH FLAG FOOD FORK FROG GATE GIFT GOLD HALL HAND HERB HILL HOOK IRON JAZZ KITE LAKE LAMP
LEAF LIFT LION LOCK MENU MILK MOON MOTH NECK OPEN OVEN PARK PIPE PLUM POOL POST QUAY QUIZ RAIN RICE RING ROAD ROCK
SALE SALT SHOE SHOP SILK SOAP SOUP TAXI TENT TOWN TREE TUBE VASE VIEW WALK WEST WIND WOLF YARD ZERO ZONE APPLE BEACH
BREAD BRICK CABIN CANDY CHAIR CHESS CLOCK CLOUD COACH CRANE DANCE DEPOT DRINK EAGLE EARTH FENCE FERRY FLOOR FRUIT
GLASS GRAPE HEART HONEY HORSE HOTEL HOUSE JUICE KAYAK LEMON LIGHT LUNCH MANGO MARSH METRO MOTEL MUSIC NORTH OCEAN
OLIVE ONION PAPER PEACH PHONE PIANO PIZZA PLAZA QUEEN RADIO RIVER SALAD SHEEP SOUTH SPICE STAGE STORE SUGAR TABLE
TIGER TOWER TRAIN VALVE VIDEO WATER WHALE WHEAT YACHT ZEBRA ANCHOR ARCADE AUTUMN BAKERY BAMBOO BRANCH BRIDGE BUTTER
CAMERA CANYON CASTLE CHEESE CHURCH CINEMA CIRCUS COFFEE COTTON DESERT DINNER DOCTOR ENGINE FABRIC FOREST GARAGE GARDEN
GINGER GUITAR HAMMER HARBOR ISLAND JUNGLE KITTEN LADDER LIZARD MARKET MEADOW MIRROR MUSEUM NEEDLE OFFICE ORANGE OYSTER
PALACE PENCIL PEPPER POTATO RABBIT RIBBON ROCKET SALMON SCHOOL SILVER SPIDER SQUARE STATUE STREET SUMMER TEMPLE TICKET
TUNNEL VALLEY VIOLIN WALNUT WINDOW WINTER YELLOW ZODIAC
"""
WORDS = tuple(_LIST.split())
BY_LENGTH = {n: tuple(word for word in WORDS if len(word) == n) for n in (3, 4, 5, 6)}
# Seven rows of five dots each, as hexadecimal numbers.
_ROWS = {
    "0": "0E 11 13 15 19 11 0E", "1": "04 0C 04 04 04 04 0E", "2": "0E 11 01 06 08 10 1F", "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02", "5": "1F 10 1E 01 01 11 0E", "6": "06 08 10 1E 11 11 0E", "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E", "9": "0E 11 11 0F 01 02 0C", "A": "0E 11 11 1F 11 11 11", "B": "1E 11 11 1E 11 11 1E",
    "C": "0E 11 10 10 10 11 0E", "D": "1C 12 11 11 11 12 1C", "E": "1F 10 10 1E 10 10 1F", "F": "1F 10 10 1E 10 10 10",
    "G": "0E 11 10 17 11 11 0F", "H": "11 11 11 1F 11 11 11", "I": "0E 04 04 04 04 04 0E", "J": "07 02 02 02 02 12 0C",
    "K": "11 12 14 18 14 12 11", "L": "10 10 10 10 10 10 1F", "M": "11 1B 15 15 11 11 11", "N": "11 11 19 15 13 11 11",
    "O": "0E 11 11 11 11 11 0E", "P": "1E 11 11 1E 10 10 10", "Q": "0E 11 11 11 15 12 0D", "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E", "T": "1F 04 04 04 04 04 04", "U": "11 11 11 11 11 11 0E", "V": "11 11 11 11 11 0A 04",
    "W": "11 11 11 15 15 15 0A", "X": "11 11 0A 04 0A 11 11", "Y": "11 11 11 0A 04 04 04", "Z": "1F 01 02 04 08 10 1F",
}  # fmt: skip


@lru_cache(maxsize=1024)
def glyph_mask(character: str, height: int) -> np.ndarray:
    """Coverage in [0, 1] of each pixel of a character: float32 `[height, round(height * 5 / 7)]`."""
    rows = [int(row, 16) for row in _ROWS[character].split()]
    dots = np.array([[row >> (4 - i) & 1 for i in range(5)] for row in rows], np.float32)
    width = round(height * 5 / 7)
    r, c = (np.arange(n * 8) * dots.shape[axis] // (n * 8) for axis, n in ((0, height), (1, width)))
    return dots[r][:, c].reshape(height, 8, width, 8).mean((1, 3))


def draw_text(rng: np.random.Generator) -> str:
    """A number of 2 to 5 digits, or a word of 3 to 6 letters."""
    if rng.random() < 0.5:
        return "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(2, 6))))
    words = BY_LENGTH[int(rng.integers(3, 7))]
    return words[int(rng.integers(len(words)))]


def similar_text(text: str, rng: np.random.Generator) -> str:
    """Another text of the same kind and length: a number with one or two other digits, or a word of as many letters."""
    if text.isdigit():
        digits = list(text)
        for at in rng.choice(len(text), min(len(text), int(rng.integers(1, 3))), replace=False):
            digits[at] = str((int(digits[at]) + int(rng.integers(1, 10))) % 10)
        return "".join(digits)
    words = BY_LENGTH[len(text)]
    return words[int(rng.integers(len(words)))]
