"""Groups of options: a command names one parameter, and typer sees the options."""

from __future__ import annotations

from dataclasses import fields

import typer
from typer.testing import CliRunner

from patchscope_nn.cli import app, groups, options
from patchscope_nn.plan import Optimisations


def test_a_group_is_spread_into_its_options():
    took = []
    tiny = typer.Typer()

    @tiny.command()
    @groups.grouped
    def command(recipe: options.Recipe, *, models: groups.Models, json: options.Json = False):
        took.append((recipe, models, json))

    done = CliRunner().invoke(tiny, ["mine", "--model", "a", "--source-remote", "no", "--json"])
    assert done.exit_code == 0, done.output
    assert took == [("mine", groups.Models(model="a", source_remote="no"), True)]
    assert took[0][1].where == {"remote": False, "source_remote": False}


def test_each_optimisation_is_a_switch():
    assert tuple(field.name for field in fields(groups.Switches)) == Optimisations.names()
    given = groups.Planning().execution_options(groups.Switches(late_entry=False))
    assert given["optimisations"] == Optimisations(late_entry=False)


def test_run_and_plan_share_their_options():
    commands = typer.main.get_command(app).commands
    run, plan = ({option.name for option in commands[name].params} for name in ("run", "plan"))
    assert run - plan == {"jobs", "out", "report", "reuse"}
    assert plan <= run
