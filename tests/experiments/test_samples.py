import pytest

from experiments.demo import samples


def test_an_option_is_not_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        samples.main(["--help"])
    assert ended.value.code == 0 and "folder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
