"""The JSON Schema of recipes, for editors: names of what is installed, options of each. Draft-07 constructs only."""

from typing import Any

from attnzoo.core import options_of
from attnzoo.recipe.schema import Recipe
from attnzoo.zoo import Registry, load_zoo


def recipe_schema() -> dict[str, Any]:
    """The schema, with an `enum` of the installed names."""
    zoo = load_zoo()
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs")
    components: dict[str, tuple[str, Registry[Any]]] = {
        "Use": ("use", zoo.mechanisms),
        "Fuse": ("fuse", zoo.fusions),
    }
    for model, (key, registry) in components.items():
        definition = definitions[model]
        definition["properties"][key] = {
            "enum": list(registry),
            "description": definition["properties"][key]["description"],
        }
        definition["allOf"] = [
            {
                "if": {"properties": {key: {"const": name}}},
                "then": {"properties": {"with": _options(entry.value)}},
            }
            for name, entry in registry.items()
        ]
    spec = {
        "anyOf": [
            {"$ref": "#/definitions/Use"},
            {"$ref": "#/definitions/Fuse"},
            {"enum": list(zoo.mechanisms)},
        ]
    }
    definitions["Spec"] = spec
    for key in ("attention", "pool"):
        schema["properties"][key] = {"$ref": "#/definitions/Spec"}
    definitions["Override"]["properties"]["put"] = {
        "anyOf": [{"$ref": "#/definitions/Spec"}, {"type": "null"}]
    }
    definitions["Fuse"]["properties"]["of"]["items"] = {"$ref": "#/definitions/Spec"}
    step = definitions["Train"]["properties"]["augment"]
    step["items"] = {"anyOf": [step["items"], {"type": "string"}]}
    schema["required"] = ["recipe"]  # the rest may come through `extends`
    skip = schema["properties"]["skip"]  # a name is short for a mapping
    skip["anyOf"].append({"enum": definitions["SkipSpec"]["properties"]["use"]["enum"]})
    hosts = {
        "vit": "VitHost",
        "cct": "CctHost",
        "pyramid": "PyramidHost",
        "dual": "DualHost",
        "seq2seq": "Seq2SeqHost",
        "sequence": "SequenceHost",
    }
    for kind, host in hosts.items():
        definitions[host]["required"] = []
        definitions[host]["properties"]["kind"] = {"const": kind}
    for stream in ("scale", "pair", "features", "tokens", "given"):
        definitions[f"{stream.title()}Stream"]["properties"]["stream"] = {"const": stream}
    schema["properties"]["host"]["anyOf"] = schema["properties"]["host"].pop("oneOf")
    return _draft7(
        {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "definitions": definitions}
    )


def _options(cls: type) -> dict[str, Any]:
    schema = options_of(cls).model_json_schema()
    return {"type": "object", "properties": schema.get("properties", {}), "additionalProperties": False}


def _draft7(node: Any) -> Any:
    """References where draft 7 keeps definitions; without the discriminators that are OpenAPI's."""
    if isinstance(node, dict):
        return {
            key: value.replace("#/$defs/", "#/definitions/") if key == "$ref" else _draft7(value)
            for key, value in node.items()
            if key != "discriminator"
        }
    return [_draft7(item) for item in node] if isinstance(node, list) else node
