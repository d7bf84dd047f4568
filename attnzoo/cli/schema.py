"""`attnzoo schema`: the JSON Schema of recipes, for editors."""


def schema() -> None:
    """Print the JSON Schema of recipes, with the names and options of everything installed."""
    from attnzoo.cli.render import say_json
    from attnzoo.recipe.json_schema import recipe_schema

    say_json(recipe_schema())
