from .operation_search import RecipeSearch as RecipeSearch
