"""docs/cli.md says what `--help-all` says, an option once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE = """
import sys
from evoprune_cli.cli_docs import reference
text = reference()
assert "torch" not in sys.modules
sys.stdout.buffer.write(text.encode())
"""


def test_the_reference_is_up_to_date_whatever_the_terminal(cli):
    environment = os.environ | {
        "COLUMNS": "40",
        "FORCE_COLOR": "1",
        "EVOPRUNE_BUDGET": "0.3",
        "EVOPRUNE_MODEL": "other",
    }
    made = subprocess.run([sys.executable, "-c", MADE], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert made.returncode == 0, made.stderr.decode()
    text = made.stdout.decode()
    stored = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert text == stored, "make it anew: python -m evoprune_cli.cli_docs > docs/cli.md"
    assert all(len(line) <= 80 for line in text.split("```text")[1].splitlines()) and "\x1b" not in text
    for command in ("ask", "batch", "eval", "inspect", "methods", "profile", "verify"):
        assert f"## evoprune {command}\n" in text
    assert cli("ask", "--help-all").out.strip() in text
    assert text.count("Branch, tag or commit") == 1 and "  As in ask: --revision, " in text
