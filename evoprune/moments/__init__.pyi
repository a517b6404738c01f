from .search import Moment as Moment
from .search import Search as Search
