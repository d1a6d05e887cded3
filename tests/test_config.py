"""The configuration: what is refused and how, what is derived, what goes with what."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedveil.config import (
    BUILT_IN_SIZES,
    TRANSPORT,
    ConfigError,
    FedveilError,
    MechanismName,
    RunConfig,
    RunPolicy,
    load_config,
    not_below,
    override,
    parse_setting,
    small_not_below,
    validated,
)

WriteFile = Callable[[str, str], Path]

MECHANISMS: tuple[MechanismName, ...] = get_args(MechanismName)

SMALL = '[data]\nsource = "sklearn:digits"\n[model]\nfamily = "vae"\n'


def raw_config(**sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return raw


def config(**sections: dict[str, Any]) -> RunConfig:
    return validated(RunConfig, raw_config(**sections))


def refusal(raw: dict[str, Any]) -> str:
    """The one line that refuses a configuration."""
    with pytest.raises(ConfigError) as caught:
        validated(RunConfig, raw)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Bad values: the whole line, so that field, value and mend all stand in it.


@pytest.mark.parametrize(
    ("section", "option", "value", "line"),
    [
        ("privacy", "epsilon", -1, "privacy.epsilon = -1: must be > 0"),
        ("privacy", "epsilon", 0, "privacy.epsilon = 0: must be > 0"),
        ("privacy", "epsilon", float("nan"), "privacy.epsilon = NaN: must be a finite number"),
        ("privacy", "epsilon", float("inf"), "privacy.epsilon = Infinity: must be a finite number"),
        ("privacy", "epsilon", "3", 'privacy.epsilon = "3": must be a valid number'),
        ("privacy", "epsilon", True, "privacy.epsilon = true: must be a valid number"),
        ("privacy", "delta", 1, "privacy.delta = 1: must be < 1"),
        ("privacy", "delta", 1.5, "privacy.delta = 1.5: must be < 1"),
        ("privacy", "delta", 0, "privacy.delta = 0: must be > 0"),
        ("privacy", "delta", float("nan"), "privacy.delta = NaN: must be a finite number"),
        ("privacy", "clipping_norm", 0, "privacy.clipping_norm = 0: must be >= 1e-06"),
        ("privacy", "sampling_rate", 0, "privacy.sampling_rate = 0: must be > 0"),
        ("privacy", "sampling_rate", 1.5, "privacy.sampling_rate = 1.5: must be <= 1"),
        ("federation", "sites", 0, "federation.sites = 0: must be >= 1"),
        ("federation", "sites", 2.5, "federation.sites = 2.5: must be a valid integer"),
        ("federation", "sites", "ten", 'federation.sites = "ten": must be a valid integer'),
        ("federation", "sites", True, "federation.sites = true: must be a valid integer"),
        ("federation", "rounds", -1, "federation.rounds = -1: must be >= 0"),
        ("federation", "seed", -1, "federation.seed = -1: must be >= 0"),
        ("federation", "min_replies", 0, "federation.min_replies = 0: must be >= 1"),
        (
            "federation",
            "min_replies",
            11,
            (
                'federation.min_replies = 11: under aggregation.encryption = "secagg" it is '
                "secagg.n_min = 9; leave it out, or set that"
            ),
        ),
        ("data", "source", 3, "data.source = 3: must be a valid string"),
        ("data", "records", 0, "data.records = 0: must be >= 1"),
        ("data", "holdout", 1, "data.holdout = 1: must be < 1"),
        ("data", "holdout", -0.1, "data.holdout = -0.1: must be >= 0"),
        ("data", "audit", 1.0, "data.audit = 1.0: must be < 1"),
        ("data", "alpha", 0, "data.alpha = 0: must be > 0"),
        ("training", "ema", 1, "training.ema = 1: must be < 1"),
        ("training", "learning_rate", 0, "training.learning_rate = 0: must be > 0"),
        ("training", "micro_batch", 0, "training.micro_batch = 0: must be >= 1"),
        (
            "training",
            "local_steps",
            2,
            (
                "training.local_steps = 2: adam takes one step a round at the server; use 1, or "
                'aggregation.strategy = "fedavg"'
            ),
        ),
        ("model", "latent", 0, "model.latent = 0: must be >= 1"),
        ("model", "family", "gan", "model.family = \"gan\": must be 'vae' or 'marginal'"),
        (
            "data",
            "partition",
            "dirichelt",
            (
                "data.partition = \"dirichelt\": must be 'iid', 'dirichlet' or 'column'; "
                'did you mean "dirichlet"?'
            ),
        ),
        ("privacy", "epsilonn", 3, 'privacy.epsilonn: unknown key; did you mean "epsilon"?'),
        ("model", "latnt", 3, 'model.latnt: unknown key; did you mean "latent"?'),
        ("privacy", "epsilon_holdout", 0, "privacy.epsilon_holdout = 0: must be > 0"),
        ("privacy", "epsilon_holdout", -1, "privacy.epsilon_holdout = -1: must be > 0"),
        ("privacy", "epsilon_holdout", 101, "privacy.epsilon_holdout = 101: must be <= 100"),
        (
            "privacy",
            "epsilon_holdout",
            float("nan"),
            "privacy.epsilon_holdout = NaN: must be a finite number",
        ),
        ("evaluation", "every", -1, "evaluation.every = -1: must be >= 0"),
        ("evaluation", "every", 0.5, "evaluation.every = 0.5: must be a valid integer"),
        ("evaluation", "every", True, "evaluation.every = true: must be a valid integer"),
        ("evaluation", "samples", 99, "evaluation.samples = 99: must be >= 100"),
        ("evaluation", "samples", 10**7, "evaluation.samples = 10000000: must be <= 1e+06"),
        ("evaluation", "training_share", 1, "evaluation.training_share = 1: must be < 1"),
        ("evaluation", "training_share", -0.1, "evaluation.training_share = -0.1: must be >= 0"),
        ("evaluation", "evry", 3, 'evaluation.evry: unknown key; did you mean "every"?'),
        ("policy", "epsilon_lifetime", 0, "policy.epsilon_lifetime = 0: must be > 0"),
        (
            "policy",
            "epsilon_lifetime",
            float("inf"),
            "policy.epsilon_lifetime = Infinity: must be a finite number",
        ),
        ("policy", "delta_lifetime", 0, "policy.delta_lifetime = 0: must be > 0"),
        ("policy", "delta_lifetime", 1, "policy.delta_lifetime = 1: must be < 1"),
        (
            "policy",
            "composition",
            "aditon",
            (
                "policy.composition = \"aditon\": must be 'addition' or 'rdp'; "
                'did you mean "addition"?'
            ),
        ),
        # Within one plan only: across runs that are chosen adaptively it is no valid composition.
        (
            "policy",
            "composition",
            "pld",
            "policy.composition = \"pld\": must be 'addition' or 'rdp'",
        ),
        (
            "policy",
            "epsilon_lifetme",
            3,
            'policy.epsilon_lifetme: unknown key; did you mean "epsilon_lifetime"?',
        ),
        ("policy", "epsilon_per_run", 0, "policy.epsilon_per_run = 0: must be > 0"),
        ("policy", "delta_per_run", 1, "policy.delta_per_run = 1: must be < 1"),
        ("policy", "min_sites", 1, "policy.min_sites = 1: must be >= 2"),
        ("policy", "min_uploaders", 256, "policy.min_uploaders = 256: must be <= 255"),
        ("policy", "min_t_collude", -1, "policy.min_t_collude = -1: must be >= 0"),
        ("policy", "mechanisms", [], "policy.mechanisms = []: must not be empty"),
        ("policy", "mechanisms", "central", 'policy.mechanisms = "central": must be a list'),
        (
            "policy",
            "units",
            ["record", "persn"],
            (
                "policy.units.1 = \"persn\": must be 'record', 'person' or 'site'; "
                'did you mean "person"?'
            ),
        ),
        ("policy", "families", ["vae", ""], 'policy.families.1 = "": must not be empty'),
        ("policy", "max_parameters", 0, "policy.max_parameters = 0: must be >= 1"),
        (
            "policy",
            "coordinator",
            "me",
            'policy.coordinator = "me": must match ^[0-9a-f]{64}$',
        ),
        # A real site's own business: a run cannot say these of its simulated ones.
        (
            "policy",
            "approval",
            "automatic",
            (
                "policy.approval: unknown key; known are epsilon_lifetime, delta_lifetime, "
                "composition, epsilon_per_run, delta_per_run, min_sites, min_uploaders, "
                "min_t_collude, mechanisms, units, families, encryption, max_parameters, "
                "coordinator, self_test, folder"
            ),
        ),
        ("secagg", "t_collude", -1, "secagg.t_collude = -1: must be >= 0"),
        ("secagg", "t_collude", 254, "secagg.t_collude = 254: must be <= 253"),
        ("secagg", "n_min", 0, "secagg.n_min = 0: must be >= 1"),
        ("secagg", "threshold", 0, "secagg.threshold = 0: must be >= 1"),
        ("secagg", "threshold", 6.0, "secagg.threshold = 6.0: must be a valid integer"),
        ("secagg", "epoch_rounds", 0, "secagg.epoch_rounds = 0: must be >= 1"),
        ("secagg", "epoch_rounds", 4097, "secagg.epoch_rounds = 4097: must be <= 4096"),
        ("secagg", "deadline", 0, "secagg.deadline = 0: must be > 0"),
        ("secagg", "deadline", 86401, "secagg.deadline = 86401: must be <= 86400"),
        ("secagg", "treshold", 6, 'secagg.treshold: unknown key; did you mean "threshold"?'),
        ("data", "persons", 0, "data.persons = 0: must be >= 1"),
        (
            "privacy",
            "unit",
            "patient",
            "privacy.unit = \"patient\": must be 'record', 'person' or 'site'",
        ),
        (
            "aggregation",
            "encryption",
            "secag",
            (
                "aggregation.encryption = \"secag\": must be 'none', 'sealed' or 'secagg'; "
                'did you mean "secagg"?'
            ),
        ),
        ("data", "ledger", 3, "data.ledger = 3: must be a valid string"),
        (
            "data",
            "ledger",
            "home",
            "data.dataset_id: missing: data.ledger needs the name of the account",
        ),
        # The file's name for it is `schema`; the attribute's name is none of the user's business.
        ("data", "schema_file", "s.toml", 'data.schema_file: unknown key; did you mean "schema"?'),
    ],
)
def test_a_bad_value_is_refused_in_one_line(
    section: str, option: str, value: object, line: str
) -> None:
    assert refusal(raw_config(**{section: {option: value}})) == line


def test_an_unknown_section_gets_the_nearest_one() -> None:
    assert refusal(raw_config(pivacy={})) == 'pivacy: unknown key; did you mean "privacy"?'


def test_an_unknown_key_like_no_other_gets_the_known_ones() -> None:
    line = refusal(raw_config(clean={"zzz": 1}))
    assert line == "clean.zzz: unknown key; known are type_error, unknown_category, out_of_bounds"


def test_a_section_that_is_no_table_is_refused() -> None:
    line = refusal({**raw_config(), "privacy": 3})
    assert line == "privacy = 3: must be a section, [privacy]"


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"model": {"family": "vae"}}, "data: missing: it has no default"),
        ({"data": {}, "model": {"family": "vae"}}, "data.source: missing: it has no default"),
        (
            {"data": {"source": "sklearn:digits"}, "model": {}},
            "model.family: missing: it has no default",
        ),
    ],
)
def test_what_has_no_default_must_be_given(raw: dict[str, Any], line: str) -> None:
    assert refusal(raw) == line


def test_an_empty_source_is_refused() -> None:
    assert refusal(raw_config(data={"source": ""})).startswith('data.source = ""')


def test_the_unknown_family_comes_before_its_unknown_options() -> None:
    line = refusal(raw_config(model={"family": "vea", "a": 1, "b": 2}))
    expected = "must be 'vae' or 'marginal'; did you mean \"vae\"?"
    assert line == f'model.family = "vea": {expected}'


@pytest.mark.parametrize(("holdout", "audit"), [(0.5, 0.5), (0.9, 0.2), (0.3, 0.7)])
def test_something_must_be_left_to_train_on(holdout: float, audit: float) -> None:
    line = refusal(raw_config(data={"holdout": holdout, "audit": audit}))
    assert line.startswith(f"data.holdout + data.audit = {holdout + audit:g}: must leave records")


def test_shares_that_leave_a_little_are_fine() -> None:
    kept = config(data={"holdout": 0.5, "audit": 0.4})
    assert kept.pool == pytest.approx(179.7)


@pytest.mark.parametrize(
    "data",
    [{"partition": "column"}, {"partition": "iid", "column": "x"}, {"column": "x"}],
)
def test_a_column_goes_with_its_partition_only(data: dict[str, Any]) -> None:
    line = refusal(raw_config(data=data))
    assert line.startswith('data.column = "x": ' if "column" in data else "data.column: missing")
    assert 'data.partition = "column"' in line


def test_a_column_with_its_partition_is_fine() -> None:
    assert config(data={"partition": "column", "column": "x"}).data.column == "x"


@pytest.mark.parametrize("name", ["", "../cardiology", "a b", "a\n", ".hidden", "ä", "a/b"])
def test_an_account_has_a_plain_name(name: str) -> None:
    line = refusal(raw_config(data={"dataset_id": name}))
    assert line.startswith(f"data.dataset_id = {json.dumps(name, ensure_ascii=False)}: must match ")


def durable(**sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a ledger that outlives its run; each keyword's options win."""
    raw = raw_config(
        data={"ledger": "/srv/ledger", "dataset_id": "cardiology-2026"},
        policy={"epsilon_lifetime": 10.0, "delta_lifetime": 1e-4},
    )
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return raw


class TestALedgerThatOutlivesItsRun:
    def test_is_fine_with_an_account_and_limits(self) -> None:
        found = validated(RunConfig, durable())
        assert found.data.ledger == "/srv/ledger"
        assert found.dataset_id == "cardiology-2026"
        assert found.lifetime == (10.0, 1e-4)

    @pytest.mark.parametrize("name", ["epsilon_lifetime", "delta_lifetime"])
    def test_needs_both_limits(self, name: str) -> None:
        """The default, this run's own budget, would grow with every run that asks for more."""
        raw = durable()
        del raw["policy"][name]
        assert refusal(raw) == (
            f"policy.{name}: missing: data.ledger outlives this run, so say what all runs together "
            "may spend"
        )

    def test_pays_for_nothing_that_has_no_price(self) -> None:
        assert refusal(durable(privacy={"mechanism": "none"})) == (
            'data.ledger: no budget pays for privacy.mechanism = "none"; leave data.ledger out'
        )

    def test_has_a_name(self) -> None:
        assert refusal(durable(data={"ledger": ""})).startswith('data.ledger = "": must')


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_filter_needs_a_limit_of_its_own(mechanism: str) -> None:
    """In Renyi terms a run costs more than its plan: its own budget would not admit it."""
    raw = raw_config(privacy={"mechanism": mechanism}, policy={"composition": "rdp"})
    assert refusal(raw).startswith("policy.epsilon_lifetime: missing: policy.composition = ")
    raw["policy"]["epsilon_lifetime"] = 5.0
    assert validated(RunConfig, raw).lifetime == (5.0, 1e-5)


@pytest.mark.parametrize("mechanism", sorted({*MECHANISMS} - {"site"}))
@pytest.mark.parametrize("every", [None, 0, 3])
def test_figures_of_training_records_need_held_out_ones(mechanism: str, every: int | None) -> None:
    raw = raw_config(
        data={"holdout": 0.0},
        privacy={"mechanism": mechanism},
        evaluation={"every": every, "training_share": 0.1},
    )
    assert refusal(raw) == (
        "evaluation.training_share = 0.1: needs records to hold the figures against; "
        "set data.holdout > 0"
    )
    raw["evaluation"]["training_share"] = 0.0
    assert validated(RunConfig, raw).evaluations == 0


def test_a_value_with_a_line_break_still_gives_one_line() -> None:
    assert refusal(raw_config(model={"family": "a\nb"})).startswith('model.family = "a\\nb"')


def test_errors_carry_the_exit_code_of_a_wrong_call() -> None:
    assert ConfigError("x").exit_code == 2
    assert FedveilError("x").exit_code == 1
    assert issubclass(ConfigError, FedveilError)


def test_whole_numbers_serve_as_numbers() -> None:
    assert config(privacy={"epsilon": 3}).privacy.epsilon == 3.0


# Files.


def test_a_missing_file_names_itself_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: cannot be read (No such file or directory); check the path"
    )


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"[data\nsource=", b"\xff\xfe\x00", b"a = 1\na = 2\n"])
def test_what_is_no_toml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: is not TOML: ")
    assert "\n" not in str(caught.value)


def test_paths_in_the_file_are_relative_to_it(
    write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write_file(
        "runs/run.toml",
        '[data]\nsource = "../adult.csv"\nschema = "adult.toml"\nledger = "../home"\n'
        'dataset_id = "adult"\n[model]\nfamily = "vae"\n'
        "[policy]\nepsilon_lifetime = 9.0\ndelta_lifetime = 1e-4\n",
    )
    data = load_config(path).data
    assert data.source == str(tmp_path / "adult.csv")
    assert data.ledger == str(tmp_path / "home")
    assert data.schema_file == str(tmp_path / "runs" / "adult.toml")


def test_paths_in_settings_are_relative_to_the_working_directory(
    write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write_file("runs/run.toml", SMALL + "\n")
    settings = {
        "data.source": "mine.csv",
        "data.schema": "mine.toml",
        "data.ledger": "home",
        "data.dataset_id": "mine",
        "policy.epsilon_lifetime": 9,
        "policy.delta_lifetime": 1e-4,
    }
    data = load_config(path, settings).data
    assert data.source == str(tmp_path / "elsewhere" / "mine.csv")
    assert data.ledger == str(tmp_path / "elsewhere" / "home")
    assert data.schema_file == str(tmp_path / "elsewhere" / "mine.toml")


def test_absolute_paths_and_built_in_sources_stay(write_file: WriteFile) -> None:
    path = write_file("run.toml", SMALL)
    assert load_config(path).data.source == "sklearn:digits"
    assert load_config(path, {"data.source": "/srv/x.csv"}).data.source == "/srv/x.csv"


def test_settings_win_over_the_file(write_file: WriteFile) -> None:
    path = write_file("run.toml", SMALL + "[privacy]\nepsilon = 8.0\ndelta = 1e-6\n")
    found = load_config(path, {"privacy.epsilon": 2, "federation.sites": 4})
    assert (found.privacy.epsilon, found.privacy.delta, found.federation.sites) == (2.0, 1e-6, 4)


def test_a_bad_setting_names_its_field(write_file: WriteFile) -> None:
    path = write_file("run.toml", SMALL)
    with pytest.raises(ConfigError, match=r"^privacy.epsilon = -1: must be > 0$"):
        load_config(path, {"privacy.epsilon": -1})


def test_a_setting_below_a_value_is_refused() -> None:
    raw = raw_config(federation={"sites": 3})
    with pytest.raises(ConfigError, match=r"^federation\.sites\.x: sites is no section$"):
        override(raw, {"federation.sites.x": 1})


# parse_setting.


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("privacy.epsilon=3", "privacy.epsilon", 3),
        ("privacy.epsilon=3.5", "privacy.epsilon", 3.5),
        ("privacy.delta=1e-6", "privacy.delta", 1e-6),
        ("data.partition=dirichlet", "data.partition", "dirichlet"),
        ('data.partition="dirichlet"', "data.partition", "dirichlet"),
        ("a.b=true", "a.b", True),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("a.b={c = 1}", "a.b", {"c": 1}),
        ("data.source=../my data.csv", "data.source", "../my data.csv"),
        (" a.b = 3 ", "a.b", 3),
        (" a.b = text ", "a.b", "text"),
        ("a.b=x=y", "a.b", "x=y"),
        ("a.b=", "a.b", ""),
        ("a.b.c=1", "a.b.c", 1),
    ],
)
def test_a_setting_is_a_key_and_a_toml_value(text: str, key: str, value: object) -> None:
    found = parse_setting(text)
    assert found == (key, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["privacy.epsilon", "epsilon=3", "", "=3", "epsilon=0.5"])
def test_a_setting_without_section_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(text)
    assert str(caught.value) == (
        f"--set {text}: must be section.key=value, such as privacy.epsilon=3"
    )


def test_a_setting_holds_one_value() -> None:
    """A line break must not smuggle in, or silently lose, a second one."""
    key, value = parse_setting("privacy.epsilon=3\nrounds = 4")
    assert (key, value) == ("privacy.epsilon", "3\nrounds = 4")


# Derived defaults, by hand.


def test_delta_by_default() -> None:
    # 1797^-1.5 = 1 / (1797 * 42.391) = 1.3127e-5, more than 1e-5.
    assert config().delta == 1e-5
    # 10_000^-1.5 = 1e-6, less than 1e-5.
    assert config(data={"records": 10_000}).delta == pytest.approx(1e-6, rel=1e-12)
    assert config(privacy={"delta": 1e-4}).delta == 1e-4


@pytest.mark.parametrize("delta", [0.5, 1e-3, 1 / 1797])
def test_delta_must_be_below_one_record(delta: float) -> None:
    # With delta = 1/n, publishing one record whole is (0, delta)-private.
    line = refusal({**raw_config(), "privacy": {"delta": delta}})
    assert line.startswith(f"privacy.delta = {delta:g}: must be below 1/1797 records")


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("privacy", "epsilon", 101, "privacy.epsilon = 101: must be <= 100"),
        ("privacy", "clipping_norm", 1e300, "privacy.clipping_norm = 1e+300: must be <= 1e+06"),
        ("federation", "rounds", 10**6, "federation.rounds = 1000000: must be <= 100000"),
        ("federation", "seed", 2**63, f"federation.seed = {2**63}: must be < "),
    ],
)
def test_what_cannot_be_computed_is_refused(
    section: str, key: str, value: float, line: str
) -> None:
    assert refusal({**raw_config(), section: {key: value}}).startswith(line)


def test_sampling_rate_by_default() -> None:
    # 1797 records, a tenth held out: 1617.3 to train on.
    assert config().pool == pytest.approx(1617.3)
    assert config().sampling_rate == pytest.approx(512 / 1617.3)
    # Held out and audited: 10_000 * 0.7 = 7_000.
    shared = {"records": 10_000, "holdout": 0.2, "audit": 0.1}
    assert config(data=shared).sampling_rate == pytest.approx(512 / 7_000)
    assert config(privacy={"sampling_rate": 0.25}).sampling_rate == 0.25


def test_sampling_rate_is_a_site_s_own_under_fedavg() -> None:
    shared = {"records": 100_000, "holdout": 0.0}
    local = {"mechanism": "local"}
    # 100_000 / 10 sites = 10_000 records at each.
    assert config(data=shared, privacy=local).sampling_rate == pytest.approx(0.0512)
    # 1617.3 / 10 sites are fewer than 512: every record is in every step.
    assert config(privacy=local).sampling_rate == 1.0


def test_sampling_rate_never_passes_one() -> None:
    assert config(data={"records": 100}).sampling_rate == 1.0


@pytest.mark.parametrize(("strategy", "rate"), [("adam", 0.005), ("sgd", 0.5), ("fedavg", 0.005)])
def test_learning_rate_by_strategy(strategy: str, rate: float) -> None:
    chosen = config(privacy={"mechanism": "none"}, aggregation={"strategy": strategy})
    assert chosen.learning_rate == rate
    asked: dict[str, dict[str, Any]] = {
        "training": {"learning_rate": 0.03},
        "aggregation": {"strategy": strategy},
    }
    assert config(privacy={"mechanism": "none"}, **asked).learning_rate == 0.03


@pytest.mark.parametrize(
    ("mechanism", "strategy"), [("central", "adam"), ("local", "fedavg"), ("none", "adam")]
)
def test_strategy_by_mechanism(mechanism: str, strategy: str) -> None:
    assert config(privacy={"mechanism": mechanism}).strategy == strategy


@pytest.mark.parametrize("encryption", ["none", "sealed"])
@pytest.mark.parametrize(("sites", "replies"), [(1, 1), (2, 2), (3, 2), (10, 6), (11, 6)])
def test_more_than_half_the_sites_must_reply(sites: int, replies: int, encryption: str) -> None:
    chosen = config(
        federation={"sites": sites},
        privacy={"mechanism": "central"},
        aggregation={"encryption": encryption},
    )
    assert chosen.min_replies == replies


@pytest.mark.parametrize(
    ("sites", "t_collude", "threshold", "n_min"),
    [
        # threshold: floor((sites + t_collude) / 2) + 1. One in ten may drop out, one at least, and
        # none where the threshold needs them all.
        (3, 1, 3, 3),
        (4, 1, 3, 3),
        (5, 1, 4, 4),
        (9, 1, 6, 8),
        (10, 1, 6, 9),
        (10, 3, 7, 9),
        (10, 6, 9, 9),
        (10, 8, 10, 10),
        (25, 1, 14, 23),
        (100, 1, 51, 90),
        (255, 1, 129, 230),
    ],
)
def test_the_numbers_of_a_secure_sum_by_default(
    sites: int, t_collude: int, threshold: int, n_min: int
) -> None:
    chosen = config(federation={"sites": sites}, secagg={"t_collude": t_collude})
    assert (chosen.threshold, chosen.n_min, chosen.min_replies) == (threshold, n_min, n_min)


def test_the_numbers_of_a_secure_sum_as_given() -> None:
    chosen = config(secagg={"threshold": 7, "n_min": 8})
    assert (chosen.threshold, chosen.n_min, chosen.min_replies) == (7, 8, 8)
    # A threshold beyond what the default would leave raises it.
    chosen = config(secagg={"threshold": 10})
    assert (chosen.threshold, chosen.n_min) == (10, 10)


@pytest.mark.parametrize(
    ("mechanism", "encryption", "unit", "strategy"),
    [
        ("distributed", "secagg", "record", "adam"),
        ("central", "none", "record", "adam"),
        ("local", "none", "record", "fedavg"),
        ("site", "secagg", "site", "fedavg"),
        ("none", "none", "record", "adam"),
    ],
)
def test_what_a_mechanism_brings_with_it(
    mechanism: str, encryption: str, unit: str, strategy: str
) -> None:
    chosen = config(privacy={"mechanism": mechanism})
    assert (chosen.encryption, chosen.unit, chosen.strategy) == (encryption, unit, strategy)


def test_noise_is_shared_out_under_a_secure_sum_by_default() -> None:
    chosen = config()
    assert (chosen.privacy.mechanism, chosen.encryption) == ("distributed", "secagg")


class TestUnits:
    """Sizes by hand: digits have 1797 records, a tenth held out, ten sites."""

    def test_records(self) -> None:
        chosen = config()
        assert chosen.units == 1797
        assert chosen.pool == pytest.approx(1617.3)
        local = config(privacy={"mechanism": "local"})
        assert local.units == 1797
        assert local.pool == pytest.approx(161.73)

    def test_persons(self) -> None:
        chosen = config(privacy={"unit": "person"}, data={"persons": 500})
        # 500 * 0.9 to train on; 500^-1.5 = 8.9e-5, more than 1e-5.
        assert (chosen.records, chosen.units) == (1797, 500)
        assert chosen.pool == pytest.approx(450.0)
        assert (chosen.delta, chosen.sampling_rate) == (1e-5, 1.0)
        many = config(privacy={"unit": "person"}, data={"persons": 10_000})
        assert many.delta == pytest.approx(1e-6)
        assert many.sampling_rate == pytest.approx(512 / 9000)

    def test_sites(self) -> None:
        chosen = config(privacy={"mechanism": "site"}, training={"local_steps": 5})
        # The sampling within a site is no part of the price: of its own records.
        assert chosen.units == 10
        assert chosen.pool == pytest.approx(161.73)
        assert (chosen.delta, chosen.sampling_rate) == (1e-5, 1.0)

    def test_the_price_of_the_holdout_is_a_part_under_site_and_beside_it_otherwise(self) -> None:
        def holdout(**privacy: Any) -> float:  # noqa: ANN401
            return config(privacy={"epsilon": 2.0, **privacy}).epsilon_holdout

        assert holdout() == 2.0
        assert holdout(mechanism="site") == pytest.approx(0.2)
        assert holdout(mechanism="site", epsilon_holdout=1.5) == 1.5
        site = config(privacy={"mechanism": "site", "epsilon": 2.0})
        assert site.lifetime == (2.0, 1e-5)

    @pytest.mark.parametrize("held_out", [3.0, 50.0])
    def test_a_sites_holdout_cannot_cost_more_than_the_run(self, held_out: float) -> None:
        raw = raw_config(privacy={"mechanism": "site", "epsilon_holdout": held_out})
        assert refusal(raw) == (
            f"privacy.epsilon_holdout = {held_out:g}: must be below privacy.epsilon = 3, for a "
            "site's held-out records are the same site's"
        )
        assert validated(RunConfig, {**raw, **raw_config(data={"holdout": 0.0})}).evaluations == 0

    @pytest.mark.parametrize(("sites", "delta"), [(10, 0.1), (3, 0.5)])
    def test_delta_is_below_one_site(self, sites: int, delta: float) -> None:
        raw = raw_config(federation={"sites": sites}, privacy={"mechanism": "site", "delta": delta})
        assert refusal(raw).startswith(f"privacy.delta = {delta:g}: must be below 1/{sites} sites")

    def test_delta_is_below_one_person(self) -> None:
        raw = raw_config(privacy={"unit": "person", "delta": 0.01}, data={"persons": 100})
        assert refusal(raw).startswith("privacy.delta = 0.01: must be below 1/100 persons")

    def test_training_records_have_no_figures_of_their_own_under_site(self) -> None:
        raw = raw_config(privacy={"mechanism": "site"}, evaluation={"training_share": 0.1})
        assert refusal(raw) == (
            "evaluation.training_share = 0.1: goes with the units record and person; leave it out"
        )

    @pytest.mark.parametrize("mechanism", ["distributed", "central", "local", "none"])
    def test_persons_are_declared_and_only_where_they_count(self, mechanism: str) -> None:
        asked = raw_config(privacy={"mechanism": mechanism, "unit": "person"})
        assert refusal(asked).startswith('data.persons: missing: privacy.unit = "person" needs')
        idle = raw_config(privacy={"mechanism": mechanism}, data={"persons": 5})
        assert refusal(idle) == 'data.persons = 5: goes with privacy.unit = "person" only'

    def test_no_persons_under_site(self) -> None:
        line = refusal(raw_config(privacy={"mechanism": "site"}, data={"persons": 5}))
        assert line == 'data.persons = 5: goes with privacy.unit = "person" only'


@pytest.mark.parametrize(
    ("rounds", "every", "in_force", "evaluations"),
    [
        # After rounds 50, 100 and 150, and at the end.
        (200, None, 50, 4),
        # A quarter of 10 is 2.5, so every third: after 3, 6 and 9, and at the end.
        (10, None, 3, 4),
        (2, None, 1, 2),
        (1, None, 1, 1),
        (10, 0, 0, 1),
        (10, 1, 1, 10),
        (10, 5, 5, 2),  # after the tenth round is the end
        (10, 9, 9, 2),
        (10, 10, 10, 1),
        (10, 99, 99, 1),
    ],
)
def test_evaluations_are_every_so_many_rounds_and_at_the_end(
    rounds: int, every: int | None, in_force: int, evaluations: int
) -> None:
    chosen = config(federation={"rounds": rounds}, evaluation={"every": every})
    assert (chosen.evaluate_every, chosen.evaluations) == (in_force, evaluations)


@given(st.integers(1, 300), st.none() | st.integers(0, 400))
def test_there_are_as_many_evaluations_as_rounds_that_are_due(
    rounds: int, every: int | None
) -> None:
    chosen = config(federation={"rounds": rounds}, evaluation={"every": every})
    due = [n for n in range(1, rounds) if chosen.evaluate_every and n % chosen.evaluate_every == 0]
    assert chosen.evaluations == len(due) + 1


def test_nothing_is_evaluated_where_nothing_is_held_out() -> None:
    assert config(data={"holdout": 0.0}, evaluation={"every": 1}).evaluations == 0


def test_epsilon_of_the_holdout_by_default() -> None:
    assert config(privacy={"epsilon": 2.5}).epsilon_holdout == 2.5
    assert config(privacy={"epsilon": 2.5, "epsilon_holdout": 0.5}).epsilon_holdout == 0.5


def test_the_account_by_default_has_the_runs_name() -> None:
    assert config().dataset_id == "fedveil"
    assert config(federation={"name": "digits"}).dataset_id == "digits"
    named = config(federation={"name": "digits"}, data={"dataset_id": "cardiology-2026"})
    assert named.dataset_id == "cardiology-2026"


@pytest.mark.parametrize(
    ("privacy", "policy", "lifetime"),
    [
        ({"epsilon": 2.0}, {}, (2.0, 1e-5)),
        # No record is on two sides: the dearer account is what one of them may cost.
        ({"epsilon": 2.0, "epsilon_holdout": 3.0}, {}, (3.0, 1e-5)),
        ({"epsilon": 2.0, "epsilon_holdout": 0.5, "delta": 1e-6}, {}, (2.0, 1e-6)),
        ({"epsilon": 2.0}, {"epsilon_lifetime": 7.0, "delta_lifetime": 1e-4}, (7.0, 1e-4)),
        ({"epsilon": 2.0}, {"delta_lifetime": 1e-4}, (2.0, 1e-4)),
        ({"mechanism": "none"}, {}, (None, 1e-5)),
        ({"mechanism": "none"}, {"epsilon_lifetime": 7.0}, (7.0, 1e-5)),
    ],
)
def test_the_lifetime_by_default_is_this_runs_budget(
    privacy: dict[str, Any], policy: dict[str, Any], lifetime: tuple[float | None, float]
) -> None:
    assert config(privacy=privacy, policy=policy).lifetime == lifetime


def test_records_of_built_in_sources_are_known_and_of_others_asked_for() -> None:
    assert config().records == 1797
    assert config(data={"source": "sklearn:breast_cancer"}).records == 569
    assert config(data={"records": 2000}).records == 2000
    unknown = config(data={"source": "/srv/x.csv"})
    with pytest.raises(ConfigError, match=r"^data\.records: missing: declare the public size"):
        _ = unknown.records


def test_published_sizes_are_what_scikit_learn_ships() -> None:
    from sklearn import datasets

    sizes = {
        f"sklearn:{name}": len(getattr(datasets, f"load_{name}")().target)
        for name in ("digits", "breast_cancer")
    }
    assert sizes == BUILT_IN_SIZES


# resolved().


def test_resolved_writes_the_derived_values_in() -> None:
    found = config().resolved()
    assert found.federation.min_replies == 9
    assert (found.secagg.n_min, found.secagg.threshold) == (9, 6)
    assert (found.aggregation.encryption, found.privacy.unit) == ("secagg", "record")
    assert found.data.records == 1797
    assert found.training.learning_rate == 0.005
    assert found.privacy.delta == 1e-5
    assert found.privacy.sampling_rate == pytest.approx(512 / 1617.3)
    assert found.aggregation.strategy == "adam"
    assert found.data.dataset_id == "fedveil"
    assert found.privacy.epsilon_holdout == 3.0
    assert found.evaluation.every == 50
    assert (found.policy.epsilon_lifetime, found.lifetime) == (None, (3.0, 1e-5))


def test_resolved_writes_no_numbers_of_a_secure_sum_that_is_none() -> None:
    found = config(privacy={"mechanism": "central"}).resolved()
    assert (found.secagg.n_min, found.secagg.threshold) == (None, None)
    assert (found.federation.min_replies, found.aggregation.encryption) == (6, "none")


# shared().


def test_what_is_each_sites_own_is_not_shared() -> None:
    """The server and the other sites learn nothing of a site's policy or of where its ledger is."""
    said = {"composition": "rdp", "epsilon_lifetime": 6.25, "mechanisms": ["distributed"]}
    own = validated(RunConfig, durable(policy={**said, "coordinator": "ab" * 32, "folder": "/own"}))
    shared = own.resolved().shared()
    assert shared.policy == RunPolicy()
    assert shared.data.ledger is None
    text = shared.model_dump_json(by_alias=True)
    assert not any(told in text for told in ("6.25", "/srv/ledger", "rdp", "abab", "/own"))
    assert RunConfig.model_validate_json(text) == shared


@pytest.mark.parametrize("limit", [5.0, 20.0])
def test_runs_that_differ_in_a_policy_only_are_shared_alike(limit: float) -> None:
    own, other = (
        validated(RunConfig, durable(policy={"epsilon_lifetime": e})) for e in (10.0, limit)
    )
    assert own.shared() == other.shared()
    changed = validated(RunConfig, durable(privacy={"epsilon": 2.0}))
    assert changed.shared() != own.shared()


# Properties.


def any_run(
    mechanism: MechanismName,
    secure: bool,
    sites: int,
    records: int | None,
    holdout: float,
    epsilon: float,
    held_out: float | None,
    every: int | None,
    limit: float | None,
) -> RunConfig:
    secure = mechanism == "distributed" or (secure and sites >= 3)
    encryption = "secagg" if secure else "sealed"
    if held_out is not None and mechanism == "site":
        held_out = min(held_out, epsilon / 2)
    return config(
        federation={"sites": max(sites, 3) if secure else sites},
        data={"records": records, "holdout": holdout},
        privacy={"mechanism": mechanism, "epsilon": epsilon, "epsilon_holdout": held_out},
        aggregation={"encryption": encryption},
        evaluation={"every": every},
        policy={"epsilon_lifetime": limit, "units": ["record", "site"], "max_parameters": 9},
    )


runs = st.builds(
    any_run,
    st.sampled_from(MECHANISMS),
    st.booleans(),
    st.integers(1, 50),
    st.none() | st.integers(1, 10**9),
    st.floats(0, 0.99),
    st.floats(0.01, 100),
    st.none() | st.floats(0.01, 100),
    st.none() | st.integers(0, 300),
    st.none() | st.floats(0.01, 1000),
)


@given(runs)
def test_resolving_changes_nothing_in_force_and_nothing_twice(run: RunConfig) -> None:
    once = run.resolved()
    assert once.resolved() == once
    for name in (
        "strategy", "encryption", "unit", "records", "units", "pool", "delta", "sampling_rate",
        "learning_rate", "min_replies", "n_min", "threshold", "epsilon_holdout", "evaluate_every",
        "evaluations", "dataset_id", "lifetime",
    ):  # fmt: skip
        assert getattr(once, name) == getattr(run, name)
    assert once.shared().shared() == once.shared()
    for name in ("records", "delta", "sampling_rate", "epsilon_holdout", "evaluations"):
        assert getattr(once.shared(), name) == getattr(run, name)


@given(runs)
def test_a_resolved_run_survives_plain_values_and_json(run: RunConfig) -> None:
    once = run.resolved()
    assert validated(RunConfig, once.model_dump(by_alias=True)) == once
    text = json.dumps(once.model_dump(by_alias=True, mode="json"))
    assert validated(RunConfig, json.loads(text)) == once
    assert RunConfig.model_validate_json(once.model_dump_json(by_alias=True)) == once


def test_a_schema_survives_under_its_name_in_the_file() -> None:
    once = config(data={"schema": "/srv/s.toml"}).resolved()
    assert once.model_dump(by_alias=True)["data"]["schema"] == "/srv/s.toml"
    assert validated(RunConfig, once.model_dump(by_alias=True)) == once


def test_a_run_is_frozen_and_can_be_hashed() -> None:
    """A price is kept by its configuration: lists of a policy included."""
    policy = {"mechanisms": ["central", "distributed"], "families": ["vae"]}
    run = config(policy=policy)
    assert hash(run) == hash(config(policy=policy))
    with pytest.raises(ValidationError, match="frozen"):
        run.privacy.epsilon = 100.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        run.privacy = run.privacy  # type: ignore[misc]


def test_where_a_run_runs_is_none_of_the_sites_business() -> None:
    """So that it may go on elsewhere: its terms, and its price, stay what they are."""
    here = validated(RunConfig, raw_config())
    ray = {
        "engine": "ray", "ray_address": "10.0.0.1:1", "client_cpus": 2, "client_gpus": 0.5,
        "patience": 5.0,
    }  # fmt: skip
    there = validated(RunConfig, raw_config(federation=ray))
    assert here != there
    assert here.shared() == there.shared()
    assert set(TRANSPORT) == set(ray)


@pytest.mark.parametrize(
    ("bound", "said"),
    [(1e-5, "1e-05"), (1.0476e-7, "1.1e-07"), (9.99e-6, "1e-05"), (2.5e-6, "2.5e-06"), (0, "0"),
     (3.0000001e-6, "3.1e-06"), (0.012, "0.012")],
)  # fmt: skip
def test_nor_is_a_delta(bound: float, said: str) -> None:
    assert small_not_below(bound) == said


@pytest.mark.parametrize(
    ("option", "value"),
    [("ray_address", "10.0.0.1:6379"), ("client_cpus", 2), ("client_gpus", 0.5)],
)
def test_options_of_ray_are_refused_elsewhere(option: str, value: object) -> None:
    line = refusal(raw_config(federation={option: value}))
    assert line == f'federation.{option}: goes with federation.engine = "ray" only'
    allowed = raw_config(federation={option: value, "engine": "ray"})
    assert getattr(validated(RunConfig, allowed).federation, option) == value


@pytest.mark.parametrize("address", ["ray://10.0.0.1:6379", "10.0.0.1", "a b:1", "host:", ""])
def test_a_ray_address_is_a_host_and_a_port(address: str) -> None:
    line = refusal(raw_config(federation={"ray_address": address, "engine": "ray"}))
    assert line.startswith("federation.ray_address = ")


@pytest.mark.parametrize(
    ("bound", "digits", "said"),
    [
        (7.9981, 3, "7.999"), (7.998, 3, "7.998"), (0.3, 3, "0.300"), (8.0, 3, "8.000"),
        (1.0004e-3, 3, "0.002"), (0.0, 3, "0.000"), (2.341, 2, "2.35"), (100.0, 2, "100.00"),
    ],
)  # fmt: skip
def test_a_bound_is_never_said_to_be_less(bound: float, digits: int, said: str) -> None:
    assert not_below(bound, digits) == said


def test_importing_the_configuration_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, fedveil.config; "
        "print([m for m in ('torch', 'flwr', 'sklearn', 'scipy', 'matplotlib', 'opacus', 'polars') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
