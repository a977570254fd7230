import pytest

from preftune.config.command_line import command_line


@pytest.fixture
def told(capsys, monkeypatch):
    """What a command line is told, by the key: `told("loss.betta=1")["loss.betta"]`; nothing where all is well."""
    monkeypatch.setenv("COLUMNS", "2000")

    def tell(*overrides, recipe="dpo"):
        try:
            command_line(recipe, list(overrides))
        except SystemExit as stop:
            assert stop.code == 2
        lines = [line[2:] for line in capsys.readouterr().err.splitlines()[1:]]
        return {key.strip(): text.strip() for key, _, text in (line.partition("  ") for line in lines)}

    return tell
