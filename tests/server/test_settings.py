"""Where settings come from, what they may be, and what a running server takes over."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.training import Hyperparameters
from server import __main__ as cli
from server.config import ConfigError, PerBlock, make_config
from server.options import BY_KEY, OPTIONS
from server.service import _Reloading
from server.settings import PREFIX, Effective, Setting, resolve, take_over
from tests.server.builders import (
    LAYOUT,
    Site,
    make_block,
    make_manifest,
    settle,
    with_personal_head,
)

TINY = make_manifest(*[make_block(name, *layout)[0] for name, layout in LAYOUT.items()])
TWO = """
rounds = 5
data_dir = "/data"
[federation.watches]
artifacts = "a"
rounds = 7
[federation.cars]
artifacts = "b"
data_dir = "/cars"
token = "c"
"""


def from_file(folder: Path, text: str, **flags: Any) -> Effective:
    (folder / "s.toml").write_text(text)
    return resolve({"config": str(folder / "s.toml"), **flags}, {})


# Sources


@given(st.sets(st.sampled_from(["file", "environment", "flag"])))
def test_the_highest_source_wins(present: set[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "s.toml"
        path.write_text("rounds = 1\n" if "file" in present else "")
        environment = {PREFIX + "ROUNDS": "2"} if "environment" in present else {}
        flags = {"rounds": "3"} if "flag" in present else {}
        found = resolve({"config": str(path), **flags}, environment).server["rounds"]
        order = {
            "flag": (3, "--rounds"),
            "environment": (2, PREFIX + "ROUNDS"),
            "file": (1, str(path)),
        }
        highest = next((name for name in order if name in present), "")
        assert found == order.get(highest, (0, "default"))


def test_the_file_in_the_working_folder_is_read_if_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve({}, {}).server["rounds"] == (0, "default")
    Path("server.toml").write_text("rounds = 4")
    assert resolve({}, {}).server["rounds"] == (4, "server.toml")
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        resolve({}, {PREFIX + "CONFIG": "none.toml"})


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_has_a_flag_a_variable_and_a_key(option: Any) -> None:
    help_text = cli._parser().format_help()
    assert f"--{option.name} " in help_text or f"--{option.name}\n" in help_text
    if option.default is not None:  # a default can be written
        text = "" if option.default == () else str(option.default)
        assert option.read(text) == option.default


# Forms

PER_BLOCK = {
    "3": PerBlock(3),
    "3,head=1": PerBlock(3, {"head": 1}),
    "3, head=1,fusion=2": PerBlock(3, {"head": 1, "fusion": 2}),
}


@pytest.mark.parametrize("text", PER_BLOCK)
def test_a_number_per_block(text: str) -> None:
    assert BY_KEY["quorum"].read(text) == PER_BLOCK[text]
    assert BY_KEY["quorum"].read(str(PER_BLOCK[text])) == PER_BLOCK[text]


def test_tables_lists_and_switches_of_toml(tmp_path: Path) -> None:
    text = (
        'quorum = {default = 2, head = 5}\nprivate_blocks = ["head", "fusion"]\nnesterov = true\n'
    )
    found = from_file(tmp_path, text).server
    assert found["quorum"].value == PerBlock(2, {"head": 5})
    assert found["private_blocks"].value == ("head", "fusion")
    assert found["nesterov"].value is True
    assert resolve({"nesterov": "true", "private_blocks": "head, fusion"}, {}).server[
        "private_blocks"
    ].value == ("head", "fusion")


WRONG = {
    "rounds = true": "rounds: expected a whole number, found True",
    "rounds = 1.5": "rounds: expected a whole number, found 1.5",
    "deadline = 'soon'": "deadline: expected a number, found 'soon'",
    "colour = 1": "colour: there is no such setting",
    "quorum = '1,head'": "quorum: expected a whole number, found ''",
    "quorum = 0": "quorum: found 0, expected at least 1",
    "seed = 1099511627777": "seed: found 1099511627777, expected at most 1099511627776",
    "rounds = 1099511627777": "rounds: found 1099511627777, expected at most 1099511627776",
    "aggregator = 'best'": "aggregator: aggregator 'best' is not known",
    "codec = 'zip'": "codec: unknown codec 'zip', expected one of f32, f16, bf16, int8, topk:SHARE",
    "codec = 'topk:0.7'": "topk-int8:SHARE with a SHARE of 0.5 at most",
    "selection = 'utility:x'": "is not a number",
    "mode = 'fast'": "mode: expected one of sync, async, found 'fast'",
    "nesterov = 'yes'": "nesterov: expected true or false, found 'yes'",
    "rounds = ": "cannot be read",
    "[federation.Cars]": "expected a name of a-z, 0-9 and '-'",
    "[federation]\ncars = 1": "[federation] cars: expected a table [federation.cars]",
    "[federation.cars]\nhttp = 'x:1'": "http is the whole server's",
    "[federation.cars]\ncolour = 1": r"[federation.cars] colour: there is no such setting",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(WRONG[text])) as caught:
        from_file(tmp_path, text)
    assert "s.toml" in str(caught.value)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="PETALFL_SERVER_ROUNDS: expected a whole number"):
        resolve({}, {PREFIX + "ROUNDS": "x"})
    with pytest.raises(ConfigError, match="PETALFL_SERVER_ROUND: there is no such setting"):
        resolve({}, {PREFIX + "ROUND": "1"})


HYPERPARAMETERS = {"max_steps": ("30", 30), "method": ("'fedalt'", "fedalt")}
OUTSIDE = {
    "max_steps = -1": "max_steps: -1 is outside [0, 1e+06]",
    "max_steps = 2_000_000": "max_steps: 2000000 is outside [0, 1e+06]",
    "method = 'fedper'": "method: expected one of fedsim, fedalt, found 'fedper'",
    "max_steps = 1.5": "max_steps: expected a whole number, found 1.5",
}


@pytest.mark.parametrize("key", HYPERPARAMETERS)
def test_a_hyperparameter_reaches_the_devices_tasks(tmp_path: Path, key: str) -> None:
    text, value = HYPERPARAMETERS[key]
    settings = from_file(tmp_path, f'artifacts = "a"\n{key} = {text}').federations["default"]
    assert getattr(make_config("x", settings, TINY).hyperparameters, key) == value


def test_what_devices_do_after_the_last_round_has_nothing_of_the_rounds(tmp_path: Path) -> None:
    rounds = (
        'artifacts = "a"\nlearning_rate = 0.5\nmomentum = 0.25\nbatch_size = 4\nepochs = 2\n'
        'max_steps = 9\nproximal_mu = 0.5\nmethod = "fedalt"\nmax_grad_norm = 2.0\n'
    )
    for finish, expected in (
        ("", None),
        ("finish_rate = 0.5", None),
        ("finish_epochs = 30", (0.05, 30)),
        ("finish_epochs = 3\nfinish_rate = 0.5", (0.25, 3)),
    ):
        settings = from_file(tmp_path, rounds + finish).federations["default"]
        found = make_config("x", settings, TINY).fine_tuning
        if expected is None:
            assert found is None
            continue
        rate, epochs = expected
        assert found == Hyperparameters(
            rate, momentum=0.25, batch_size=4, epochs=epochs, max_grad_norm=2.0
        )


@pytest.mark.parametrize(
    ("text", "optimizer", "epochs"),
    [
        ("", "momentum:0.5", 30),
        ('server_optimizer = "sgd"', "sgd", 30),
        ("server_momentum = 0.25", "momentum:0.25", 30),
        ("finish_epochs = 0", "momentum:0.5", 0),
        ('mode = "async"', "sgd", 30),
    ],
)
def test_a_model_with_a_personal_head_has_other_defaults(
    text: str, optimizer: str, epochs: int, tmp_path: Path
) -> None:
    settings = from_file(tmp_path, f'artifacts = "a"\n{text}').federations["default"]
    config = make_config("x", settings, with_personal_head(TINY))
    assert config.server_optimizer == optimizer
    assert (config.fine_tuning.epochs if config.fine_tuning else 0) == epochs


@pytest.mark.parametrize("text", OUTSIDE)
def test_a_hyperparameter_outside_its_limits_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(OUTSIDE[text])):
        settings = from_file(tmp_path, f'artifacts = "a"\n{text}').federations["default"]
        make_config("x", settings, TINY)


# Several federations


def test_a_federation_s_own_settings_are_above_the_file_s_and_below_flags(tmp_path: Path) -> None:
    found = from_file(tmp_path, TWO).federations
    assert {name: one["rounds"].value for name, one in found.items()} == {"watches": 7, "cars": 5}
    assert found["watches"]["data_dir"].value == Path("/data/watches")
    assert found["cars"]["data_dir"].value == Path("/cars")
    assert (found["watches"]["token"].value, found["cars"]["token"].value) == ("", "c")
    found = from_file(tmp_path, TWO, rounds="9").federations
    assert {one["rounds"] for one in found.values()} == {(9, "--rounds")}


def test_one_federation_is_named_by_its_setting(tmp_path: Path) -> None:
    assert list(resolve({"federation": "cars"}, {}).federations) == ["cars"]
    with pytest.raises(ConfigError, match=r"--federation: .* names its federations itself"):
        from_file(tmp_path, TWO, federation="cars")


def test_the_example_in_the_docs_is_possible() -> None:
    path = Path(__file__).parents[2] / "docs" / "server.toml"
    effective = resolve({"config": str(path)}, {})
    configs = {n: make_config(n, one, TINY) for n, one in effective.federations.items()}
    assert configs["watches"].private_blocks == ("fusion", "head")
    assert configs["watches"].data_dir == Path("/var/lib/petalfl/watches")
    assert configs["cars"].is_async and configs["cars"].max_upload_bytes == 2_000_000


# One next to another

IMPOSSIBLE = {
    "quorum = '1,backbone=2'": "quorum: 'backbone' is no shared block",
    "scheme = 'ph'\nquorum = '1,head=2'": "quorum: 'head' is no shared block",
    "mode = 'async'\nscheme = 'local'": "mode: async needs a block that is shared",
    "mode = 'async'\nselection = 'random'": "selection: there is none in mode async",
    "max_upload_bytes = 11": "max_upload_bytes: found 11, the smallest shared block has 12",
    "scheme = 'ph'\nprivate_blocks = 'head'": "private_blocks: there is a scheme, too",
    "private_blocks = ['tail']": "private_blocks: 'tail' is no block of the model that trains",
    "private_tensors = ['head/none']": "private_tensors: 'head/none' names no tensor of a shared",
    "scheme = 'ph'\nprivate_tensors = 'head/*'": "private_tensors: 'head/*' names no tensor of a",
    "scaffold = true\nmode = 'async'": "scaffold: not with S: mode async: updates of other",
    "scaffold = true\naggregator = 'median'": "scaffold: not with S: aggregator median: a sum has",
    "scaffold = true\nmax_update_norm = 1": "scaffold: not with S: max_update_norm 1.0: a sum",
    "scaffold = true\nquorum = '1,head=2'": "scaffold: not with S: quorum 1,head=2: what is",
    "server_momentum = 0.5\nserver_optimizer = 'adam'": "server_momentum: the server optimizer is",
    "server_momentum = 1.0": "server_momentum: server optimizer 'momentum:1.0': expected",
    "epochs = 0": "epochs: 0 is outside [1, 1000]",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_an_impossible_setting_is_named(tmp_path: Path, text: str) -> None:
    settings = from_file(tmp_path, text).server
    with pytest.raises(ConfigError) as caught:
        make_config("default", settings, TINY)
    reason = IMPOSSIBLE[text].replace("S: ", f"{tmp_path / 's.toml'}: ")
    assert reason in str(caught.value) and "s.toml: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("scheme = 'full-model'", ()),
        ("scheme = 'private-head'", ("head",)),
        ("scheme = 'private-head-fusion'", ("fusion", "head")),
        ("private_blocks = ['head', 'encoder-acc']", ("encoder-acc", "head")),
    ],
)
def test_what_is_private_by_name_or_by_list(
    tmp_path: Path, text: str, private: tuple[str, ...]
) -> None:
    settings = from_file(tmp_path, text).server
    assert make_config("default", settings, TINY).private_blocks == private


# check-config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    Site(tmp_path)
    Path("server.toml").write_text(
        'artifacts = "artifacts"\nquorum = 2\ntoken = "geheim"\n'
        'broker = "mqtt://admin:geheim@host:1883"\n'
    )
    return tmp_path


def test_check_config_shows_values_and_sources_and_no_secrets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PREFIX + "DEADLINE", "30")
    assert cli.main(["check-config", "--rounds", "6", "--scheme", "ph"]) == 0
    text = capsys.readouterr().out
    rows = {tuple(line.split()) for line in text.splitlines()}
    assert ("quorum", "2", "server.toml") in rows
    assert ("deadline", "30.0", PREFIX + "DEADLINE") in rows
    assert ("rounds", "6", "--rounds") in rows
    assert ("epochs", "1", "default") in rows
    assert "private blocks: head" in text and "schedule: cosine" in text
    assert "geheim" not in text and "mqtt://…@host:1883" in text


def test_check_config_speaks_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--json", "--buffer-size", "4,head=2"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    settings = found["federations"]["default"]["settings"]
    assert settings["buffer_size"] == {"value": "4,head=2", "source": "--buffer-size"}
    assert found["server"]["http"] == {"value": "127.0.0.1:8080", "source": "default"}
    assert settings.keys() | found["server"].keys() == BY_KEY.keys()
    assert "geheim" not in text


def test_check_config_refuses_what_the_server_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check-config", "--mode", "async", "--scheme", "local"]) == 2
    assert capsys.readouterr().err == "error: --mode: async needs a block that is shared\n"
    assert cli.main(["check-config", "--artifacts", "nowhere"]) == 2
    assert "no artifacts at nowhere" in capsys.readouterr().err


def test_without_artifacts_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 2
    assert "no artifacts: give --artifacts DIR" in capsys.readouterr().err


# Reloading


def test_only_what_can_change_changes() -> None:
    old = resolve({"rounds": "5", "seed": "1"}, {}).server
    new = resolve({"rounds": "6", "seed": "2"}, {}).server
    settings, taken, kept = take_over(old, new)
    assert settings == {**old, "rounds": Setting(6, "--rounds")}
    assert taken == {"rounds": "5 → 6 (--rounds)"}
    assert kept == {"seed": "1 → 2 (--seed)"}
    assert take_over(old, old) == (old, {}, {})


def test_no_change_shows_a_secret() -> None:
    old = resolve({"token": "open", "broker": "mqtts://me:sesame@host:1"}, {}).server
    new = resolve({"token": "shut", "broker": "mqtts://me:simsala@host:1"}, {}).server
    assert take_over(old, new).kept == {
        "token": "set, not shown → set, not shown (--token)",
        "broker": "mqtts://…@host:1 → mqtts://…@host:1 (--broker)",
    }


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_new_settings_hold_from_the_next_round_on(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    flags = {"artifacts": str(site.artifacts), "data_dir": str(site.data_dir), "mode": mode,
             "learning_rate": "0.1", "buffer_size": "1", "federation": "fed"}  # fmt: skip
    now = dict(flags)
    effective = resolve(flags, {})
    settings = effective.federations["fed"]
    config = make_config("fed", settings, site.manifest)
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    del fields["artifacts"], fields["data_dir"]
    with site.run(ready=["watch"], **fields) as run:
        reloading = _Reloading(effective, {"fed": run.federation}, lambda: resolve(now, {}))
        now.update(learning_rate="0.5", quorum="2", seed="9")
        with caplog.at_level(logging.INFO):
            reloading.run()
        assert "fed: seed needs a restart and stays: 0 → 9" in caplog.text
        assert "fed: learning_rate changes with the next round: 0.1 → 0.5" in caplog.text
        assert run.federation.config.hyperparameters.learning_rate == 0.1, "a round is open"
        await run.finish_round(1)
        await settle()
        assert run.task("watch", 2).hyperparameters.learning_rate == 0.5
        assert run.federation.config.quorum == PerBlock(2)
        assert (run.federation.config.seed, run.federation.shared.versions["head"]) == (0, 2)
        await run.finish_round(2)
        assert run.federation.shared.versions["head"] == 2, "below the new quorum"
        now.update(quorum="nonsense")
        reloading.run()
        assert "the new settings are not used: --quorum: expected a whole number" in caplog.text
        assert run.federation.config.quorum == PerBlock(2)


async def test_before_the_first_round_new_settings_hold_at_once(tmp_path: Path) -> None:
    """A server that waits for too many devices is told to wait for fewer."""
    with Site(tmp_path).run(ready=["watch"], min_devices=3) as run:
        assert run.federation.round is None
        run.federation.reconfigure(replace(run.federation.config, min_devices=1))
        await settle()
        assert run.sender.tasks(1).keys() == {"watch"}
