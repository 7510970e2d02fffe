"""Recipe files: finding, reading and checking them."""

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
    """List the names of the builtin recipes."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Return the recipes' folder: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find(name_or_path: str | Path) -> Path:
    """Find the file of a recipe.

    Args:
        name_or_path: The name of a builtin recipe, or a file; `-` is standard input.

    Returns:
        The path of the file.

    Raises:
        InputError: The recipe does not exist.
    """
    name, names = str(name_or_path), shipped()
    if name == _INPUT:
        return Path(_INPUT)
    if name in names:
        return _folder() / f"{name}.yaml"
    try:
        path = Path(name_or_path).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of an unknown user
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        short = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise InputError(f"the recipe {short!r} cannot be found: {reason}.", hint="Check the path.") from None
    if path.suffix in _ENDINGS or path.name != name:
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f"Did you mean the recipe that ships as {near[0]!r}?" if near else "Check the path."
        raise InputError(f"the recipe {name!r} does not exist.", hint=hint)
    raise InputError(
        f"{name!r} is not a recipe.", hint=f"{did_you_mean(name, names)} Or give a file: my-recipe.yaml."
    )


@checked
def load_recipe(
    name_or_path: str | Path, *, sets: Sequence[str] = (), overrides: Mapping[str, Any] = {}
) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: The name of a builtin recipe, a YAML file, or `-` for standard input.
        sets: Changes as `key.path=value` texts, with the value in YAML.
        overrides: Changes as dotted paths and values; `sets` take precedence.

    Returns:
        The recipe.

    Raises:
        SpecError: The recipe has problems; the error lists all of them, each with its line.
        InputError: The file is missing or cannot be read.
    """
    loaded = _load(find(name_or_path), sets=sets, overrides=overrides)
    if loaded.recipe is None:
        origin = "standard input" if str(name_or_path) == _INPUT else str(name_or_path)
        raise SpecError(loaded.problems, origin=origin)
    return loaded.recipe


def lint(path: str | Path) -> list[Problem]:
    """Find all problems of a recipe that can be found without its model; never raises.

    In addition to the checks of `load_recipe`, the columns that prompts, choices, references and metrics use
    are looked up in the data, unless the data comes from the Hub or a function. No code that a recipe names
    is run.

    Args:
        path: A YAML file, or the name of a builtin recipe.

    Returns:
        The problems, in the order of the file.
    """
    try:
        file = find(path)
        recipe, all_problems, document = _load(file)
        if recipe is not None:
            all_problems = _ordered(_lined(_missing(recipe, base=file.parent), document))
    except InputError as error:
        return [Problem(field="", message=str(error))]
    return all_problems


def _missing(recipe: Recipe, *, base: Path) -> list[Problem]:
    """Find the columns that a recipe or its methods use and the data lacks; each problem is listed once."""
    all_problems = missing_columns(recipe, base=base)
    known = {(problem.field, problem.message) for problem in all_problems}
    for name, variant in recipe.of_methods().items():
        all_problems += [
            replace(problem, field=f"methods.{name}.{problem.field}")
            for problem in missing_columns(variant, base=base)
            if (problem.field, problem.message) not in known
        ]
    return all_problems


class _Loaded(NamedTuple):
    """A file that was read: the recipe if it has no problems, otherwise the problems."""

    recipe: Recipe | None
    problems: list[Problem]
    document: Document


def _load(path: Path, *, sets: Sequence[str] = (), overrides: Mapping[str, Any] = {}) -> _Loaded:
    document = read_yaml(_read(path))
    all_problems = list(document.problems)
    if not isinstance(document.value, dict):
        if not all_problems:
            all_problems.append(Problem(field="", message=f"holds {_kind(document.value)}; {_BEGIN}", line=1))
        return _Loaded(None, all_problems, document)
    changes, wrong = parse_changes(sets=sets, overrides=overrides)
    raw, unmade = apply_changes(document.value, changes)
    recipe = None
    try:
        recipe = Recipe.model_validate({name: value for name, value in raw.items() if name != "methods"})
    except ValidationError as error:
        all_problems += [_place(problem, document, changes, raw) for problem in problems(error, Recipe)]
    if recipe is not None and raw.get("methods", {}) != {}:
        of_methods = variants(Recipe, raw, raw["methods"])[1]
        all_problems += [_place(problem, document, changes, raw) for problem in of_methods]
        recipe = None if of_methods else Recipe.model_validate(raw)
    all_problems = _ordered([*all_problems, *wrong, *unmade])
    return _Loaded(None if all_problems else recipe, all_problems, document)


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


def _ordered(unordered: Iterable[Problem]) -> list[Problem]:
    """Sort problems by their lines; those from outside the file come last."""
    return sorted(unordered, key=lambda problem: (problem.line is None, problem.line or 0))


def _place(problem: Problem, document: Document, changes: Sequence[Change], raw: Any) -> Problem:
    """Add to a problem its line, or the change that caused it, and advice on quotes if it helps."""
    message = problem.message
    if problem.field.endswith(".prompt") and _is_unquoted(_at(raw, problem.field)):
        message += '. Quote a text that begins with a brace: "{column}"'
    for change in reversed(changes):
        if change.concerns(problem.field):
            return Problem(field=problem.field, message=f"{message} (from {change.origin})")
    return Problem(field=problem.field, message=message, line=document.line(problem.field))


def _is_unquoted(value: Any) -> bool:
    """True if a value is what YAML reads from `{column}` without quotes."""
    return isinstance(value, dict) and bool(value) and all(item is None for item in value.values())


def _at(raw: Any, field: str) -> Any:
    for part in field.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _lined(without_lines: Iterable[Problem], document: Document) -> list[Problem]:
    return [replace(problem, line=document.line(problem.field)) for problem in without_lines]
