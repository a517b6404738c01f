"""Run a command in this process, and print the names of evoprune's modules that it imported, as a JSON list in an object."""

import contextlib
import io
import json
import sys

from evoprune_cli.main import run

if __name__ == "__main__":
    sys.argv = ["evoprune", *sys.argv[1:]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run()
    names = sorted(name for name in sys.modules if name.partition(".")[0] in ("evoprune", "evoprune_cli"))
    print(json.dumps({"modules": names}))
