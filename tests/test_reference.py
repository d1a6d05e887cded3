"""What is made from the configuration models: the README's tables and `fedveil init`'s file."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from fedveil.config import COMPATIBILITY, RunConfig, load_config, validated
from fedveil.reference import END, START, markdown, template, updated

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}


def options(families: tuple[str, ...] = ("vae", "marginal")) -> dict[str, str]:
    """Every option of a run by its dotted name in a file, with its description."""
    found: dict[str, str] = {}
    for section, owner in RunConfig.model_fields.items():
        kinds = get_args(owner.annotation) or (owner.annotation,)
        if len(kinds) > 1:  # what it is comes first
            found[f"{section}.family"] = kinds[0].model_fields["family"].description
        for kind in kinds:
            for name, field in kind.model_fields.items():
                assert field.description, f"{section}.{name} has no description"
                family = kind.__name__.removesuffix("Options").lower()
                if len(kinds) > 1 and family not in families:
                    continue
                told = f" (`{family}`)" if len(kinds) > 1 and name != "family" else ""
                found[f"{section}.{field.alias or name}"] = field.description + told
    return found


def rows() -> list[list[str]]:
    """The cells of the option table's rows."""
    lines = markdown().split("\n\n")[0].splitlines()[2:]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def test_the_template_is_the_default_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(template(), encoding="utf-8")
    assert load_config(path) == validated(RunConfig, DEFAULTS)


def test_the_template_sets_only_what_has_no_default() -> None:
    assert tomllib.loads(template()) == {
        **{section: {} for section in RunConfig.model_fields},
        **DEFAULTS,
    }


def test_the_template_s_shown_defaults_are_the_defaults(tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = \S)", r"\1", template(), flags=re.MULTILINE)
    shown = tomllib.loads(text)
    with_default = {f"{section}.{name}" for section, values in shown.items() for name in values}
    derived = {
        f"{section}.{field.alias or name}"
        for section, owner in RunConfig.model_fields.items()
        for name, field in (get_args(owner.annotation) or (owner.annotation,))[
            0
        ].model_fields.items()
        if not field.is_required() and field.default is None
    }
    assert "privacy.delta" in derived
    assert with_default == set(options(("vae",))) - derived
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == validated(RunConfig, DEFAULTS)


def test_the_template_names_every_option_once_below_its_section() -> None:
    section, found = "", []
    for line in template().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.match(r"(?:# )?(\w+) =( |$)", line):
            found.append(f"{section}.{match[1]}")
    assert found == list(options(("vae",)))


def test_every_option_stands_in_the_table_once_with_its_description() -> None:
    assert [(row[0], row[3]) for row in rows()] == [
        (f"`{name}`", description) for name, description in options().items()
    ]


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    options, compatibility, said, _, federation = markdown().split("\n\n")
    for table, cells in ((options, 4), (compatibility, 5), (federation, 4)):
        for line in table.splitlines():
            assert len(re.findall(r"(?<!\\)\|", line)) == cells + 1
    assert said == "The first of each is the default. `median` does not go with `secagg`."


@pytest.mark.parametrize(
    ("option", "values", "default"),
    [
        ("federation.name", "text", '`"fedveil"`'),
        ("federation.sites", "integer >= 1", "`10`"),
        ("federation.seed", "integer >= 0, < 9.22337e+18", "`0`"),
        ("federation.min_replies", "integer >= 1", "derived"),
        ("data.source", "text", "required"),
        ("data.schema", "text", "derived"),
        ("data.partition", "`iid`, `dirichlet`, `column`", '`"iid"`'),
        ("data.holdout", "number >= 0, < 1", "`0.1`"),
        ("clean.out_of_bounds", "`clip`, `missing`, `drop`", '`"clip"`'),
        ("model.family", "`vae`, `marginal`", "required"),
        ("training.learning_rate", "number > 0", "derived"),
        (
            "privacy.mechanism",
            "`distributed`, `central`, `local`, `site`, `none`",
            '`"distributed"`',
        ),
        ("privacy.unit", "`record`, `person`, `site`", "derived"),
        ("aggregation.encryption", "`none`, `sealed`, `secagg`", "derived"),
        ("secagg.t_collude", "integer >= 0, <= 253", "`1`"),
        ("secagg.deadline", "number > 0, <= 86400", "`600.0`"),
        ("policy.epsilon_per_run", "number > 0", "derived"),
        ("policy.delta_per_run", "number > 0, < 1", "derived"),
        ("policy.min_sites", "integer >= 2, <= 255", "`2`"),
        ("policy.units", "list of `record`, `person`, `site`", "derived"),
        ("policy.families", "list of text", "derived"),
        ("policy.folder", "text", "derived"),
        ("privacy.epsilon", "number > 0, <= 100", "`3.0`"),
        ("privacy.delta", "number > 0, < 1", "derived"),
        ("privacy.sampling_rate", "number > 0, <= 1", "derived"),
        (
            "aggregation.strategy",
            "`sgd`, `adam`, `fedavg`, `fedprox`, `fedadam`, `median`",
            "derived",
        ),
    ],
)
def test_a_row_says_what_may_be_given(option: str, values: str, default: str) -> None:
    (row,) = [row for row in rows() if row[0] == f"`{option}`"]
    assert row[1:3] == [values, default]


def test_every_mechanism_stands_in_the_second_table() -> None:
    lines = markdown().split("\n\n")[1].splitlines()[2:]
    assert len(lines) == len(COMPATIBILITY)
    assert (
        "| `local` | everyone, the server and the other sites included "
        "| `fedavg`, `fedprox`, `fedadam`, `median` | `record`, `person` "
        "| `none`, `sealed`, `secagg` |" in lines
    )
    (shared,) = [line for line in lines if line.startswith("| `distributed` |")]
    assert shared.endswith("| `adam`, `sgd` | `record`, `person` | `secagg` |")


def test_the_options_of_a_federation_stand_in_the_last_table() -> None:
    lines = markdown().split("\n\n")[4].splitlines()[2:]
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:3] for line in lines}
    assert cells["`server.address`"] == ["text", "required"]
    assert cells["`server.fleet_port`"] == ["integer >= 1, <= 65535", "`9443`"]
    assert cells["`members.sites`"] == ["list of text", "required"]
    assert cells["`members.auditors`"] == ["list of text", "`[]`"]
    assert cells["`certificates.days`"] == ["integer >= 1, <= 36525", "`825`"]
    assert len(lines) == 10


def test_updating_replaces_what_stands_between_the_markers_and_nothing_else() -> None:
    old = f"# Title\n\n{START}\nstale\n{END}\n\nThe rest.\n"
    new = updated(old)
    assert new == f"# Title\n\n{START}\n{markdown()}\n{END}\n\nThe rest.\n"
    assert updated(new) == new


@pytest.mark.parametrize("text", ["", f"{START}\n", f"{END}\n", f"{END}\n{START}\n"])
def test_a_readme_without_a_place_for_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="README: needs the lines"):
        updated(text)


def test_the_readme_is_up_to_date() -> None:
    """`make reference` mends it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert updated(readme) == readme
