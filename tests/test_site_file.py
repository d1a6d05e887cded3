"""A site's own files: what stands in them, and every fault in one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedveil.config import (
    ConfigError,
    Policy,
    RunConfig,
    SiteFile,
    SitePolicy,
    load_config,
    read_site,
    site_policy,
    validated,
)

WriteFile = Callable[[str, str], Path]

# design.md's example, without what a table alone can hold.
SITE = """
[site]
name = "st-mary"
data = "/srv/fedveil/records.parquet"
ledger = "/var/lib/fedveil/ledger.sqlite"

[map]
age = "alter"

[policy]
dataset_id = "cardiology-2026"
epsilon_lifetime = 10.0
delta_lifetime = 1e-5
epsilon_per_run = 4.0
min_sites = 3
min_uploaders = 3
min_t_collude = 1
mechanisms = ["distributed", "site"]
encryption = ["secagg"]
approval = "automatic"
"""
SMALL = """
[site]
name = "st-mary"
data = "records.csv"
ledger = "../ledger.sqlite"
[policy]
dataset_id = "cardiology-2026"
epsilon_lifetime = 10.0
delta_lifetime = 1e-5
"""


def with_line(section: str, line: str, text: str = SMALL) -> str:
    assert f"[{section}]\n" in text
    return text.replace(f"[{section}]\n", f"[{section}]\n{line}\n")


def without(name: str) -> str:
    return "".join(line for line in SMALL.splitlines(True) if not line.startswith(f"{name} ="))


def changed(name: str, value: str) -> str:
    return without(name).replace(
        "[policy]\n" if "lifetime" in name or name == "dataset_id" else "[site]\n",
        f"{'[policy]' if 'lifetime' in name or name == 'dataset_id' else '[site]'}\n"
        f"{name} = {value}\n",
    )


def refusal(path: Path, read: Callable[[Path], object] = read_site) -> str:
    """The one line that refuses a file, without the file's name before it."""
    with pytest.raises(ConfigError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


class TestASiteFile:
    def test_as_in_the_design(self, write_file: WriteFile) -> None:
        found = read_site(write_file("site.toml", SITE))
        assert isinstance(found, SiteFile)
        assert (found.site.name, found.site.keys) == ("st-mary", None)
        assert found.site.data == "/srv/fedveil/records.parquet"
        assert found.site.ledger == "/var/lib/fedveil/ledger.sqlite"
        assert found.columns == {"age": "alter"}
        assert found.policy.epsilon_per_run == 4.0
        assert found.policy.approval == "automatic"

    def test_the_strict_defaults_are_the_design_s(self, write_file: WriteFile) -> None:
        """What its example says of the floors, mechanisms and encryption goes without saying."""
        short, whole = (read_site(write_file("site.toml", text)) for text in (SMALL, SITE))
        differs = {"epsilon_per_run": 4.0}
        assert short.policy.model_copy(update=differs) == whole.policy
        assert short.policy.mechanisms == ("distributed", "site")
        assert short.policy.encryption == ("secagg",)
        floors = (short.policy.min_sites, short.policy.min_uploaders, short.policy.min_t_collude)
        assert floors == (3, 3, 1)
        assert short.columns == {}

    def test_paths_are_relative_to_it(
        self, write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "etc").mkdir()
        monkeypatch.chdir("/")
        found = read_site(write_file("etc/site.toml", with_line("site", 'keys = "keys"'))).site
        assert found.data == str(tmp_path / "etc" / "records.csv")
        assert found.ledger == str(tmp_path / "ledger.sqlite")
        assert found.keys == str(tmp_path / "etc" / "keys")

    def test_an_owner_may_accept_more(self, write_file: WriteFile) -> None:
        more = 'mechanisms = ["local"]\nencryption = ["none"]\nmin_sites = 2\nmin_t_collude = 0'
        found = read_site(write_file("site.toml", with_line("policy", more))).policy
        assert (found.mechanisms, found.encryption) == (("local",), ("none",))
        assert (found.min_sites, found.min_t_collude) == (2, 0)

    def test_a_ledger_goes_without_saying_and_a_person_may_be_asked(
        self, write_file: WriteFile
    ) -> None:
        text = with_line("policy", 'approval = "manual"', without("ledger"))
        found = read_site(write_file("site.toml", text))
        assert (found.site.ledger, found.site.keys) == (None, None)
        assert found.policy.approval == "manual"

    def test_is_frozen_and_its_policy_can_be_hashed(self, write_file: WriteFile) -> None:
        found = read_site(write_file("site.toml", SITE))
        assert hash(found.policy) == hash(read_site(write_file("site.toml", SITE)).policy)


BAD: dict[str, tuple[str, str]] = {
    "empty": ("", "site: missing: it has no default (and 1 more)"),
    "not TOML": ("[site\n", "is not TOML: "),
    "an unknown section": (with_line("site", "", SMALL) + "[polcy]\na = 1\n", '"policy"?'),
    "an unknown key of site": (with_line("site", 'nme = "a"'), 'site.nme: unknown key; did you'),
    "an unknown key of policy": (
        with_line("policy", "min_site = 3"), 'unknown key; did you mean "min_sites"?'
    ),
    "a folder of policies": (with_line("policy", 'folder = "a"'), "policy.folder: unknown key"),
    "a section that is none": ("site = 3\npolicy = 4\n", "site = 3: must be a section"),
    "a map that is none": ("map = 3\n" + SMALL, "map = 3: must be a section, [map]"),
    "a map to numbers": (SMALL + "[map]\nage = 3\n", "map.age = 3: must be a valid string"),
    "a map to nothing": (SMALL + '[map]\nage = ""\n', 'map.age = "": must not be empty'),
    "no name": (without("name"), "site.name: missing"),
    "no data": (without("data"), "site.data: missing"),
    "no account": (without("dataset_id"), "policy.dataset_id: missing"),
    "no limit of epsilon": (without("epsilon_lifetime"), "policy.epsilon_lifetime: missing"),
    "no limit of delta": (without("delta_lifetime"), "policy.delta_lifetime: missing"),
    "an empty name": (changed("name", '""'), 'site.name = "": must match'),
    "a name that is a path": (changed("name", '"../a"'), 'site.name = "../a": must match'),
    "empty data": (changed("data", '""'), 'site.data = "": must not be empty'),
    "data that is a number": (changed("data", "3"), "site.data = 3: must be a valid string"),
    "an empty ledger": (changed("ledger", '""'), 'site.ledger = "": must not be empty'),
    "empty keys": (with_line("site", 'keys = ""'), 'site.keys = "": must not be empty'),
    "an account that is a path": (changed("dataset_id", '"a/b"'), "policy.dataset_id = "),
    "epsilon 0": (changed("epsilon_lifetime", "0"), "policy.epsilon_lifetime = 0: must be > 0"),
    "epsilon endless": (
        changed("epsilon_lifetime", "inf"), "policy.epsilon_lifetime = Infinity: must be a finite"
    ),
    "epsilon no number": (changed("epsilon_lifetime", "nan"), "policy.epsilon_lifetime = NaN"),
    "delta 1": (changed("delta_lifetime", "1.0"), "policy.delta_lifetime = 1.0: must be < 1"),
    "delta 0": (changed("delta_lifetime", "0"), "policy.delta_lifetime = 0: must be > 0"),
    "an unknown composition": (
        with_line("policy", 'composition = "pld"'), "must be 'addition' or 'rdp'"
    ),
    "another approval": (
        with_line("policy", 'approval = "manuel"'),
        "must be 'automatic' or 'manual'; did you mean \"manual\"?",
    ),
}  # fmt: skip

BAD_VALUES: list[tuple[str, str, str]] = [
    ("epsilon_per_run", "0", "must be > 0"),
    ("epsilon_per_run", "nan", "must be a finite number"),
    ("epsilon_per_run", '"4"', "must be a valid number"),
    ("delta_per_run", "1", "must be < 1"),
    ("delta_per_run", "0", "must be > 0"),
    ("min_sites", "1", "must be >= 2"),
    ("min_sites", "256", "must be <= 255"),
    ("min_sites", "3.0", "must be a valid integer"),
    ("min_sites", "true", "must be a valid integer"),
    ("min_uploaders", "1", "must be >= 2"),
    ("min_uploaders", "256", "must be <= 255"),
    ("min_t_collude", "-1", "must be >= 0"),
    ("min_t_collude", "254", "must be <= 253"),
    ("mechanisms", "[]", "must not be empty"),
    ("mechanisms", '"distributed"', "must be a list"),
    ("mechanisms", "3", "must be a list"),
    ("units", "[]", "must not be empty"),
    ("families", "[]", "must not be empty"),
    ("encryption", "[]", "must not be empty"),
    ("max_parameters", "0", "must be >= 1"),
    ("max_parameters", "1e6", "must be a valid integer"),
    ("coordinator", '""', "must match ^[0-9a-f]{64}$"),
    ("coordinator", '"abc"', "must match ^[0-9a-f]{64}$"),
    ("coordinator", json.dumps("A" * 64), "must match ^[0-9a-f]{64}$"),
    ("coordinator", json.dumps("a" * 64 + "\n"), "must match ^[0-9a-f]{64}$"),
]
BAD_ITEMS: list[tuple[str, str, str]] = [
    ("mechanisms", '["distribute"]', 'did you mean "distributed"?'),
    ("mechanisms", '["site", 3]', "policy.mechanisms.1 = 3: must be 'distributed'"),
    ("units", '["records"]', 'did you mean "record"?'),
    ("families", "[3]", "policy.families.0 = 3: must be a valid string"),
    ("families", '[""]', 'policy.families.0 = "": must not be empty'),
    ("encryption", '["secag"]', 'did you mean "secagg"?'),
]


class TestABadSiteFile:
    @pytest.mark.parametrize("case", BAD)
    def test_is_refused_in_one_line(self, write_file: WriteFile, case: str) -> None:
        text, said = BAD[case]
        assert said in refusal(write_file("site.toml", text))

    @pytest.mark.parametrize(("name", "value", "said"), BAD_VALUES)
    def test_a_bad_value(self, write_file: WriteFile, name: str, value: str, said: str) -> None:
        line = refusal(write_file("site.toml", with_line("policy", f"{name} = {value}")))
        assert line.startswith(f"policy.{name} = ")
        assert line.endswith(f": {said}")

    @pytest.mark.parametrize(("name", "value", "said"), BAD_ITEMS)
    def test_a_bad_item(self, write_file: WriteFile, name: str, value: str, said: str) -> None:
        line = refusal(write_file("site.toml", with_line("policy", f"{name} = {value}")))
        assert line.startswith(f"policy.{name}.")
        assert said in line

    def test_missing(self, tmp_path: Path) -> None:
        line = refusal(tmp_path / "site.toml")
        assert line == "cannot be read (No such file or directory); check the path"

    def test_a_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path) == "cannot be read (Is a directory); check the path"

    def test_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "site.toml").write_bytes(b"\xff\xfe\x00")
        assert refusal(tmp_path / "site.toml").startswith("is not TOML: ")

    @pytest.mark.parametrize("name", ["dataset_id", "epsilon_lifetime", "delta_lifetime"])
    def test_no_default_of_a_run_stands_in(self, name: str) -> None:
        options = {"dataset_id": "a", "epsilon_lifetime": 1.0, "delta_lifetime": 1e-5}
        assert validated(SitePolicy, options).epsilon_lifetime == 1.0
        with pytest.raises(ConfigError, match=f"^{name}: missing"):
            validated(SitePolicy, {key: v for key, v in options.items() if key != name})


RUN = """
[federation]
sites = 3
[data]
source = "sklearn:digits"
[model]
family = "vae"
[policy]
epsilon_lifetime = 9.0
epsilon_per_run = 4.0
folder = "policies"
"""


@pytest.fixture
def policies(tmp_path: Path, write_file: WriteFile) -> Path:
    """A run whose second site asks for more than the others."""
    (tmp_path / "policies").mkdir()
    write_file("run.toml", RUN)
    write_file("policies/site-002.toml", "[policy]\nepsilon_per_run = 1.0\nmin_sites = 5\n")
    return tmp_path


class TestAPolicyOfASimulatedSite:
    def test_is_the_runs_without_a_folder(self) -> None:
        raw: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
        run = validated(RunConfig, raw | {"policy": {"units": ["record"]}})
        found = site_policy(run, "site-010")
        assert type(found) is Policy
        assert found == Policy(units=("record",), epsilon_lifetime=3.0, delta_lifetime=1e-5)

    def test_its_own_file_wins_option_by_option(self, policies: Path) -> None:
        run = load_config(policies / "run.toml")
        second = site_policy(run, "site-002")
        assert (second.epsilon_per_run, second.min_sites) == (1.0, 5)
        assert (second.epsilon_lifetime, second.delta_lifetime) == (9.0, 1e-5)
        for other in ("site-001", "site-003"):
            found = site_policy(run, other)
            assert (found.epsilon_per_run, found.min_sites) == (4.0, 2)

    def test_its_own_limits_win_over_the_runs_defaults(self, policies: Path) -> None:
        text = "[policy]\nepsilon_lifetime = 7.5\ndelta_lifetime = 1e-4\ncomposition = 'rdp'\n"
        (policies / "policies" / "site-001.toml").write_text(text, encoding="utf-8")
        found = site_policy(load_config(policies / "run.toml"), "site-001")
        assert (found.epsilon_lifetime, found.delta_lifetime) == (7.5, 1e-4)
        assert found.composition == "rdp"

    def test_without_noise_there_is_no_default_limit(self) -> None:
        raw: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
        run = validated(RunConfig, raw | {"privacy": {"mechanism": "none"}})
        assert site_policy(run, "site-001").epsilon_lifetime is None

    def test_the_folder_is_relative_to_the_file_and_never_shared(
        self, policies: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir("/")
        run = load_config(policies / "run.toml")
        assert run.policy.folder == str(policies / "policies")
        assert "policies" not in run.resolved().shared().model_dump_json(by_alias=True)

    def test_the_folder_in_a_setting_is_relative_to_the_working_directory(
        self, policies: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (policies / "elsewhere" / "mine").mkdir(parents=True)
        monkeypatch.chdir(policies / "elsewhere")
        run = load_config(policies / "run.toml", {"policy.folder": "mine"})
        assert run.policy.folder == str(policies / "elsewhere" / "mine")

    @pytest.mark.parametrize("name", ["site-004", "site-000", "site-1", "../site-001", ""])
    def test_of_no_site_there_is_none(self, policies: Path, name: str) -> None:
        run = load_config(policies / "run.toml")
        with pytest.raises(ConfigError, match="is no site of this run; they are site-001 to"):
            site_policy(run, name)


class TestABadFolderOfPolicies:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "policy: missing: it has no default"),
            ("[policy\n", "is not TOML: "),
            ("policy = 3\n", "policy = 3: must be a section, [policy]"),
            ("[polcy]\nmin_sites = 3\n", 'polcy: unknown key; did you mean "policy"?'),
            ("[policy]\nmin_site = 3\n", 'policy.min_site: unknown key; did you mean "min_sites"?'),
            ("[policy]\n[site]\nname = 'a'\n", "site: unknown key"),
            ("[policy]\nfolder = 'a'\n", "policy.folder: unknown key"),
            ("[policy]\ndataset_id = 'a'\n", "policy.dataset_id: unknown key"),
            ("[policy]\nepsilon_per_run = -1\n", "policy.epsilon_per_run = -1: must be > 0"),
            ("[policy]\nmechanisms = ['cental']\n", 'did you mean "central"?'),
        ],
    )
    def test_a_bad_file_is_refused_with_the_configuration(
        self, policies: Path, text: str, said: str
    ) -> None:
        path = policies / "policies" / "site-001.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(policies / "run.toml")
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{path}: ")
        assert said in line

    def test_a_filter_needs_a_limit_that_somebody_set(self, policies: Path) -> None:
        (policies / "run.toml").write_text(
            RUN.replace("epsilon_lifetime = 9.0\n", ""), encoding="utf-8"
        )
        path = policies / "policies" / "site-001.toml"
        path.write_text("[policy]\ncomposition = 'rdp'\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(policies / "run.toml")
        assert str(caught.value).startswith(f"{path}: policy.epsilon_lifetime: missing: ")

    @pytest.mark.parametrize(
        "name", ["site-004.toml", "site-1.toml", "site-001", "site-001.toml~", "notes.txt", ".x"]
    )
    def test_a_file_of_no_site_is_refused(self, policies: Path, name: str) -> None:
        """It would be a policy that its writer believes to be in force."""
        path = policies / "policies" / name
        path.write_text("[policy]\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(policies / "run.toml")
        assert str(caught.value) == (
            f"{path}: policy.folder may hold the policies of this run's sites only, site-001.toml "
            "to site-003.toml; move it elsewhere"
        )

    def test_a_missing_folder_is_refused_whenever_it_is_asked_for(self, policies: Path) -> None:
        run = load_config(policies / "run.toml")
        moved = (policies / "policies").rename(policies / "moved")
        line = f'policy.folder = "{policies / "policies"}": cannot be read (No such file or '
        for read in (
            lambda: load_config(policies / "run.toml"),
            lambda: site_policy(run, "site-001"),
        ):
            with pytest.raises(ConfigError) as caught:
                read()
            assert str(caught.value).startswith(line)
        moved.rename(policies / "policies")
        assert site_policy(run, "site-002").min_sites == 5

    def test_a_file_that_leads_nowhere_is_not_passed_over(self, policies: Path) -> None:
        run = load_config(policies / "run.toml")
        (policies / "policies" / "site-003.toml").symlink_to(policies / "gone.toml")
        with pytest.raises(ConfigError, match=r"site-003\.toml: cannot be read"):
            site_policy(run, "site-003")

    def test_a_folder_without_a_name_is_refused(self, policies: Path) -> None:
        with pytest.raises(ConfigError, match=r'^policy\.folder = "": must not be empty$'):
            load_config(policies / "run.toml", {"policy.folder": ""})
