"""Settings: who wins, where values come from, what is said of wrong ones, and the file itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from starburst_executor import config
from starburst_executor.config import Deployment, Settings
from starburst_executor.errors import ConfigError
from starburst_executor.executor import default_store

DEPLOYED: dict[str, Any] = {
    "store": "s3://bucket/runs",
    "launcher": "ecs",
    "region": "eu-west-1",
    "cluster": "starburst",
    "subnets": ("subnet-1", "subnet-2"),
    "security_groups": ("sg-1",),
    "assign_public_ip": False,
    "execution_role_arn": "arn:aws:iam::123456789012:role/execution",
    "task_role_arn": "arn:aws:iam::123456789012:role/task",
    "log_group": "/starburst",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(text: str) -> Path:
    file = config.config_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# --- who wins ------------------------------------------------------------------------


def test_nothing_set_means_this_machine(home: Path) -> None:
    found = config.load()
    assert found.settings.launcher == "local"
    assert Path(found.settings.store).is_relative_to(home)
    assert set(found.sources.values()) == {"built in"}
    assert found.sources.keys() == set(Settings.__struct_fields__)


def test_arguments_beat_variables_beat_the_file_beat_what_is_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write('[default]\nstore = "s3://file"\nregion = "file"\ncluster = "file"\n')
    monkeypatch.setenv("STARBURST_STORE", "s3://variable")
    monkeypatch.setenv("STARBURST_REGION", "variable")
    found = config.load(arguments={"store": "s3://argument", "cluster": None})
    s = found.settings
    assert (s.store, s.region, s.cluster) == ("s3://argument", "variable", "file")
    assert found.sources["store"] == "argument"
    assert found.sources["region"] == "STARBURST_REGION"
    assert found.sources["cluster"] == f"{file} [default]"
    assert found.sources["image"] == "built in"


def test_a_false_argument_is_said_and_an_empty_variable_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STARBURST_STORE", "")
    found = config.load(arguments={"assign_public_ip": False})
    assert found.settings.assign_public_ip is False
    assert found.sources["assign_public_ip"] == "argument"
    assert found.sources["store"] == "built in"


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)]
)
def test_variables_hold_booleans_and_lists_with_commas(
    text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARBURST_ASSIGN_PUBLIC_IP", text)
    monkeypatch.setenv("STARBURST_SUBNETS", "subnet-1, subnet-2,")
    settings = config.load().settings
    assert settings.assign_public_ip is value
    assert settings.subnets == ("subnet-1", "subnet-2")


def test_blanks_around_a_value_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        '[default]\nregion = "wrong"\n'
        '[mine]\nregion = " eu-west-1 "\nsubnets = ["subnet-1\\n"]\nimage = "x"\n'
    )
    monkeypatch.setenv("STARBURST_PROFILE", "mine\n")
    monkeypatch.setenv("STARBURST_STORE", " s3://bucket/runs\n")
    monkeypatch.setenv("STARBURST_IMAGE", " \n")
    monkeypatch.setenv("STARBURST_ASSIGN_PUBLIC_IP", "false\n")
    monkeypatch.setenv("STARBURST_MAX_HOURLY_COST", "2.5\r\n")
    s = config.load(arguments={"cluster": "workers\n"}).settings
    assert (s.store, s.region, s.subnets) == ("s3://bucket/runs", "eu-west-1", ("subnet-1",))
    assert (s.image, s.cluster) == ("x", "workers")
    assert (s.assign_public_ip, s.max_hourly_cost) == (False, 2.5)


def test_the_executor_and_the_command_line_use_the_store_of_the_file() -> None:
    write('[default]\nstore = "s3://bucket/of-the-file"\n')
    assert default_store() == "s3://bucket/of-the-file"


def test_profiles_are_chosen_by_argument_or_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write('[default]\nregion = "one"\n[lab]\nregion = "two"\n')
    assert config.load().settings.region == "one"
    assert config.load("lab").settings.region == "two"
    monkeypatch.setenv("STARBURST_PROFILE", "lab")
    assert config.load().settings.region == "two"
    assert config.load("default").settings.region == "one"


# --- what is wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[default]\nsubnet = []\n", ["'subnet'", "did you mean 'subnets'", "[default]"]),
        ("[default]\nfrobnicate = 1\n", ["'frobnicate'", "known: store, "]),
        ("[default]\nstore = 3\n", ["store=3", "a string", "[default]"]),
        ("[default]\nsubnets = [3]\n", ["subnets=[3]", "a list of strings"]),
        ('[default]\nassign_public_ip = "x"\n', ["'x'", "true or false"]),
        ("[default\n", ["is not TOML"]),
        ('store = "s3://x"\n', ["'store'", "[default]"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_setting_and_the_place(text: str, said: list[str]) -> None:
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        config.load()
    for part in [str(file), *said]:
        assert part in str(caught.value)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARBURST_ASSIGN_PUBLIC_IP", "perhaps")
    with pytest.raises(ConfigError, match=r"STARBURST_ASSIGN_PUBLIC_IP.*true or false"):
        config.load()


def test_a_profile_that_was_asked_for_must_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write('[default]\nregion = "one"\n')
    with pytest.raises(ConfigError, match=r"'lab'.*it has: default.*setup --profile"):
        config.load("lab")
    monkeypatch.setenv("STARBURST_PROFILE", "no/name")
    with pytest.raises(ConfigError, match="'no/name' is not a valid profile name"):
        config.load()


def test_a_file_that_cannot_be_read_is_an_error() -> None:
    write("").unlink()
    config.config_file().mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load()


# --- the deployment ------------------------------------------------------------------


def test_no_cluster_means_no_deployment() -> None:
    assert config.load_deployment() is None


def test_a_written_profile_loads_as_the_deployment_that_was_written() -> None:
    config.write_profile("lab", DEPLOYED)
    deployment = config.load_deployment("lab")
    expected = {n: v for n, v in DEPLOYED.items() if n != "launcher"}
    assert deployment == Deployment(**expected, image=config.default_image())
    minor = f"{sys.version_info.major}.{sys.version_info.minor}-slim"
    assert config.default_image().endswith(minor)


def test_a_cluster_with_something_lacking_says_what_and_how_to_set_it() -> None:
    del (values := dict(DEPLOYED))["subnets"]
    config.write_profile("default", values)
    with pytest.raises(ConfigError) as caught:
        config.load_deployment()
    for part in ("'starburst'", "subnets", "STARBURST_SUBNETS", "setup"):
        assert part in str(caught.value)


def test_the_region_of_the_aws_settings_fills_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.write_profile("default", {**DEPLOYED, "region": ""})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    deployment = config.load_deployment()
    assert deployment is not None
    assert deployment.region == "us-west-2"


# --- the file ------------------------------------------------------------------------


def test_what_is_written_is_read_again_whatever_it_holds() -> None:
    odd = 'quo"te, back\\slash, tab\t, \x7f, \x01, é, 😀, # no comment'
    config.write_profile("default", {"cluster": odd, "subnets": [odd, ""]})
    settings = config.load().settings
    assert settings.cluster == odd
    assert settings.subnets == (odd, "")


def test_writing_a_profile_keeps_the_others_and_all_comments() -> None:
    file = write(
        "# mine\n[default]  # here\n"
        'region = "one"\n\n# of lab\n[lab]\nregion = "two"\n["third"]\nregion = "three"\n'
    )
    config.write_profile("lab", {"region": "new"})
    config.write_profile("default", {"region": "one"})
    assert config.load("default").settings.region == "one"
    assert config.load("lab").settings.region == "new"
    assert config.load("third").settings.region == "three"
    assert "# mine" in file.read_text()
    assert "# of lab" in file.read_text()


def test_a_profile_is_replaced_whole_and_removed_whole() -> None:
    config.write_profile("default", {"region": "one", "cluster": "c"})
    config.write_profile("default", {"region": "two"})
    assert config.load().settings.cluster == ""
    config.write_profile("lab", {"region": "three"})
    file = config.remove_profile("default")
    assert config.load().settings.region == ""
    assert config.load("lab").settings.region == "three"
    config.remove_profile("lab")
    config.remove_profile("lab")
    assert file.read_text().strip() == ""


def test_a_layout_that_cannot_be_edited_safely_is_left_alone() -> None:
    text = '[default]\nimage = """\n[lab]\n"""\n[lab]\nregion = "two"\n'
    file = write(text)
    with pytest.raises(ConfigError, match="by hand"):
        config.write_profile("default", {"region": "one"})
    assert file.read_text() == text


def test_nothing_wrong_is_ever_written() -> None:
    with pytest.raises(ConfigError, match=r"'regoin'.*'region'"):
        config.write_profile("default", {"regoin": "one"})
    assert not config.config_file().exists()


def test_a_linked_file_stays_a_link(home: Path) -> None:
    dotfile = home / "dotfiles.toml"
    dotfile.write_text("")
    file = write("")
    file.unlink()
    file.symlink_to(dotfile)
    config.write_profile("default", {"region": "one"})
    assert file.is_symlink()
    assert 'region = "one"' in dotfile.read_text()


def test_a_folder_that_cannot_be_written_is_an_error(home: Path) -> None:
    config.config_file().parent.parent.mkdir(parents=True, exist_ok=True)
    config.config_file().parent.touch()
    with pytest.raises(ConfigError, match=r"cannot be written|cannot be read"):
        config.write_profile("default", {"region": "one"})


def test_every_setting_can_be_set_by_a_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for field in msgspec.structs.fields(Settings):
        value = {bool: "false", float: "1.5"}.get(field.type, "x")
        monkeypatch.setenv(f"STARBURST_{field.name.upper()}", value)
    sources = config.load().sources
    assert sources == {name: f"STARBURST_{name.upper()}" for name in sources}


def test_reading_settings_does_not_import_boto3() -> None:
    code = (
        "import sys; from starburst_executor import config; config.load(); "
        "assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
