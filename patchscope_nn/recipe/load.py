"""Recipe files: find one, read it, and say everything that is wrong with it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import InputError, Problem, SpecError, did_you_mean
from patchscope_nn.recipe.changes import Change, apply_changes, parse_changes
from patchscope_nn.recipe.columns import missing_columns
from patchscope_nn.recipe.document import Document, read_yaml
from patchscope_nn.recipe.methods import variants
from patchscope_nn.recipe.model import Recipe
from patchscope_nn.spec import problems

_ENDINGS = (".yaml", ".yml")
#: The name of a recipe that is read from standard input; its relative files start from the current folder.
_INPUT = "-"
_SHOWN = 80
_BEGIN = "a recipe is a mapping that begins with name, title and source"


def shipped() -> list[str]:
    """The names of the recipes that ship."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """The recipes: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: The name of a recipe that ships, or a file; `-` is standard input.

    Returns:
        Its path.

    Raises:
        InputError: There is no such recipe.
    """
    given, names = str(name_or_path), shipped()
    if given == _INPUT:
        return Path(_INPUT)
    if given in names:
        return _folder() / f"{given}.yaml"
    try:
        path = Path(name_or_path).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, or the home of no user
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
        raise InputError(f"the recipe {shown!r} cannot be found: {reason}.", hint="Check the path.") from None
    if path.suffix in _ENDINGS or path.name != given:
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f"Did you mean the recipe that ships as {near[0]!r}?" if near else "Check the path."
        raise InputError(f"the recipe {given!r} does not exist.", hint=hint)
    raise InputError(
        f"{given!r} is no recipe.", hint=f"{did_you_mean(given, names)} Or give a file: my-recipe.yaml."
    )


@checked
def load_recipe(
    name_or_path: str | Path, *, sets: Sequence[str] = (), overrides: Mapping[str, Any] = {}
) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: The name of a recipe that ships, a YAML file, or `-` for standard input.
        sets: Changes as `key.path=value` texts, the value in YAML.
        overrides: Changes as dotted paths and values; `sets` win over them.

    Returns:
        The recipe.

    Raises:
        SpecError: The recipe has problems; all are listed, each with its line.
        InputError: The file is missing or cannot be read.
    """
    loaded = _load(find(name_or_path), sets=sets, overrides=overrides)
    if loaded.recipe is None:
        origin = "standard input" if str(name_or_path) == _INPUT else str(name_or_path)
        raise SpecError(loaded.problems, origin=origin)
    return loaded.recipe


def lint(path: str | Path) -> list[Problem]:
    """Everything that can be found wrong with a recipe without its model; never raises.

    Besides what `load_recipe` checks, the columns that prompts, choices, references and metrics ask for are
    looked up in the data, unless that is on the Hub or given by a function. No code of a recipe's is run.

    Args:
        path: A YAML file, or the name of a recipe that ships.

    Returns:
        The problems, in the order of the file.
    """
    try:
        file = find(path)
        recipe, found, document = _load(file)
        if recipe is not None:
            found = _ordered(_lined(_missing(recipe, base=file.parent), document))
    except InputError as error:
        return [Problem(field="", message=str(error))]
    return found


def _missing(recipe: Recipe, *, base: Path) -> list[Problem]:
    """The columns that a recipe asks for and its data lacks; of methods those that the recipe has not."""
    found = missing_columns(recipe, base=base)
    known = {(problem.field, problem.message) for problem in found}
    for name, variant in recipe.of_methods().items():
        found += [
            replace(problem, field=f"methods.{name}.{problem.field}")
            for problem in missing_columns(variant, base=base)
            if (problem.field, problem.message) not in known
        ]
    return found


class _Loaded(NamedTuple):
    """A file, read: the recipe where nothing is wrong with it, else the problems."""

    recipe: Recipe | None
    problems: list[Problem]
    document: Document


def _load(path: Path, *, sets: Sequence[str] = (), overrides: Mapping[str, Any] = {}) -> _Loaded:
    document = read_yaml(_read(path))
    found = list(document.problems)
    if not isinstance(document.value, dict):
        if not found:
            found.append(Problem(field="", message=f"holds {_kind(document.value)}; {_BEGIN}", line=1))
        return _Loaded(None, found, document)
    changes, wrong = parse_changes(sets=sets, overrides=overrides)
    raw, unmade = apply_changes(document.value, changes)
    recipe = None
    try:
        recipe = Recipe.model_validate({name: value for name, value in raw.items() if name != "methods"})
    except ValidationError as error:
        found += [_place(problem, document, changes, raw) for problem in problems(error, Recipe)]
    if recipe is not None and raw.get("methods", {}) != {}:
        of_methods = variants(Recipe, raw, raw["methods"])[1]
        found += [_place(problem, document, changes, raw) for problem in of_methods]
        recipe = None if of_methods else Recipe.model_validate(raw)
    found = _ordered([*found, *wrong, *unmade])
    return _Loaded(None if found else recipe, found, document)


def _read(path: Path) -> str:
    try:
        if path == Path(_INPUT):
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return path.read_text("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the recipe {str(path)!r} cannot be read: {reason}.", hint="Check the file."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"the recipe {str(path)!r} is not UTF-8 text.", hint="Save it as UTF-8.") from None


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {list: "a list", str: "a text", bool: "a boolean"}.get(type(value), "a number")


def _ordered(found: Iterable[Problem]) -> list[Problem]:
    """In the order of the file; those from outside it last."""
    return sorted(found, key=lambda problem: (problem.line is None, problem.line or 0))


def _place(problem: Problem, document: Document, changes: Sequence[Change], raw: Any) -> Problem:
    """A problem with its line, or with the change that caused it, and with advice on quotes."""
    message = problem.message
    if problem.field.endswith(".prompt") and _is_unquoted(_at(raw, problem.field)):
        message += '. Quote a text that begins with a brace: "{column}"'
    for change in reversed(changes):
        if change.concerns(problem.field):
            return Problem(field=problem.field, message=f"{message} (from {change.origin})")
    return Problem(field=problem.field, message=message, line=document.line(problem.field))


def _is_unquoted(value: Any) -> bool:
    """Whether a value is what YAML makes of `{column}` without quotes."""
    return isinstance(value, dict) and bool(value) and all(item is None for item in value.values())


def _at(raw: Any, field: str) -> Any:
    for part in field.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _lined(found: Iterable[Problem], document: Document) -> list[Problem]:
    return [replace(problem, line=document.line(problem.field)) for problem in found]
