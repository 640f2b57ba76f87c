"""Secrets: refused where they would be kept, taken from the environment when they are used, masked wherever they are shown."""

import json
import sys

import pytest

from madformer.cli import main
from madformer.config import config_hash, load_experiment, load_run, write_config
from madformer.config.validation import expand_variables
from madformer.errors import ConfigError, InputError, mask_secrets, printable
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from tests.tiny_runs import DIGITS, tiny_run

SECRETS = [
    ("https://me:hush@host/x.parquet", "https://me:***@host/x.parquet"),
    ("s3://key:hu/sh+@bucket/x", "s3://key:***@bucket/x"),
    ("redis://:hush@host", "redis://:***@host"),
    ("mysql://me:hu@sh#?@host:3306/a", "mysql://me:***@host:3306/a"),
    ("simplecache::https://me:hush@host/x", "simplecache::https://me:***@host/x"),
    ("zip://x.png::https://me:hush@host/x.zip", "zip://x.png::https://me:***@host/x.zip"),
    ("https://host/x?token=hush&page=2", "https://host/x?token=***&page=2"),
    ("https://host/x?page=2&sig=hush", "https://host/x?page=2&sig=***"),
    ("https://host/x?X-Amz-Signature=hush&X-Amz-Date=1", "https://host/x?X-Amz-Signature=***&X-Amz-Date=1"),
    ("postgresql://host/a?user=me&password=hush", "postgresql://host/a?user=me&password=***"),
    ("https://host/x#access_token=hush", "https://host/x#access_token=***"),
]
PLAIN = [
    "hf://datasets/owner/name@COMMIT",
    "https://host:8080/a@b/x.tar",
    "zip://x.png::hf://datasets/owner/name@COMMIT/x.zip",
    "https://host/x?page=2&keyword=cat",
    "postgresql://me@host/a",
    "postgresql://me:$WORD@host/a",
    "https://me:${oc.env:WORD}@host/x?token=$TOKEN",
    "folder/a=b?token",
    "data.max_skipped=3",
]


@pytest.fixture
def called(monkeypatch, capsys):
    """A command in this process: its exit status, and all that it shows."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["madformer", *map(str, words)])
        monkeypatch.setattr("sys.excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize(("text", "masked"), SECRETS)
def test_secrets_are_masked_and_refused_in_any_field(text, masked, tmp_path):
    assert mask_secrets(f"a '{text}' b {text}") == f"a '{masked}' b {masked}" and mask_secrets(masked) == masked
    assert str(InputError(f"no {text} no")) == f"no {masked} no"
    for field in ("data.source", "data.latents", "output_dir", "evaluation.held_out_source", "data.codec"):
        with pytest.raises(ConfigError, match="put the secret into a variable") as caught:
            load_experiment(DIGITS, [f'{field}="{text}"'])
        assert "hush" not in str(caught.value) and "\n" not in str(caught.value)
    file = tmp_path / "secret.yaml"
    file.write_text(json.dumps({"data": {"source": text}}))
    with pytest.raises(ConfigError, match=r"secret\.yaml: data\.source = "):
        load_experiment(file)
    for keys in ({"storage": text}, {"overrides": {"data.source": text}}, {"grid": {"data.source": ["digits", text]}}):
        file.write_text(json.dumps({"experiment": str(DIGITS), **keys}))
        with pytest.raises(ConfigError, match="put the secret into a variable") as caught:
            load_sweep(file)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("text", PLAIN)
def test_what_holds_no_secret_stays_as_it_is(text):
    assert mask_secrets(text) == printable(text) == text


@pytest.mark.parametrize("override", ["storage=", "sotrage=", "data.source=", "evaluate.storage=", "-storage=", "data.sourc="])
def test_a_secret_on_the_command_line_reaches_no_file_and_no_message(override, called, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps({"experiment": str(DIGITS), "output_dir": str(tmp_path / "runs")}))
    argument = f"{override}postgresql://me:hush@127.0.0.1:9/a"
    for words in (("sweep", "status", file), ("train", DIGITS)):
        status, shown = called(*words, "--", argument)
        assert status == 2 and "hush" not in shown and len(shown.splitlines()) == 1, shown
    assert not any("hush" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_variables_are_resolved_when_used_and_neither_kept_nor_hashed(tmp_path, monkeypatch):
    hashes = set()
    for reference in ("${oc.env:PLACE}", "s3://key:${oc.env:WORD}@bucket/x", "s3://key:$WORD@bucket/x"):
        for word in ("hush", "another"):
            monkeypatch.setenv("WORD", word)
            monkeypatch.setenv("PLACE", f"s3://key:{word}@bucket/x")
            config = tiny_run(
                tmp_path, f"data.source={reference}", "data.codec=vae:x", "data.latents=x", "model.latent_channels=4"
            )
            assert config.data.source == reference
            assert expand_variables("data.source", reference) == f"s3://key:{word}@bucket/x"
            hashes.add(config_hash(config))
        write_config(config, config.run_dir)
        monkeypatch.delenv("PLACE")
        monkeypatch.delenv("WORD")
        assert load_run(config.run_dir).data.source == reference, "a run can be read without its secrets"
        with pytest.raises(ConfigError, match="is not set in the environment"):
            expand_variables("data.source", reference)
    assert len(hashes) == 3
    monkeypatch.setenv("PLACE", "/data/x")
    plain = tiny_run(tmp_path, "data.source=${oc.env:PLACE}", "data.codec=vae:x", "data.latents=x", "model.latent_channels=4")
    assert plain.data.source == "/data/x", "what is no secret is resolved as ever"


def test_variables_may_hold_values_of_any_type(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBER", "5")
    monkeypatch.setenv("SWITCH", "false")
    file = tmp_path / "typed.yaml"
    fields = {"seed": "${oc.env:NUMBER}", "data": {"flip": "${oc.env:SWITCH}", "max_skipped": "${oc.decode:${oc.env:NUMBER}}"}}
    file.write_text(json.dumps({"base": str(DIGITS), **fields}))
    config = load_experiment(file, ["trainer.max_steps=${oc.env:NUMBER}"])
    assert (config.seed, config.data.flip, config.data.max_skipped, config.trainer.max_steps) == (5, False, 5, 5)


def test_cells_of_a_sweep_keep_the_name_of_a_secret(called, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "s3://key:hush@bucket/x")
    monkeypatch.setenv("STUDY", "postgresql://me:hush@127.0.0.1:9/a")
    file = tmp_path / "small.yaml"
    overrides = {"data.source": "${oc.env:PLACE}", "data.codec": "vae:x", "data.latents": "x", "model.latent_channels": 4}
    content = {"experiment": str(DIGITS), "output_dir": str(tmp_path), "overrides": overrides, "storage": "${oc.env:STUDY}"}
    file.write_text(json.dumps(content))
    sweep = load_sweep(file)
    [cell] = sweep_cells(sweep)
    assert cell.config.data.source == "${oc.env:PLACE}" and sweep.storage == "${oc.env:STUDY}"
    status, shown = called("sweep", "status", file)
    assert status == 2 and "me:***@127.0.0.1" in shown and "hush" not in shown
    assert load_sweep(file, ["storage=${oc.env:STUDY}"]).storage == "${oc.env:STUDY}"
    write_config(cell.config, cell.run)
    assert "hush" not in (cell.run / "config.yaml").read_text()


def test_an_old_run_with_a_secret_still_loads_and_shows_it_masked(tmp_path):
    config = tiny_run(tmp_path, "data.source=x", "data.codec=vae:x", "data.latents=x", "model.latent_channels=4")
    write_config(config, config.run_dir)
    path = config.run_dir / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("source: x", "source: https://me:hush@host/x", 1).replace(config_hash(config), "a" * 16))
    with pytest.raises(InputError, match="edited") as caught:
        load_run(config.run_dir)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"me:\*\*\*@host"):
        write_config(load_experiment(path), tmp_path / "another")
