"""Record current results: `python -m tests.contract.record [NAME...]`. Records all cases, or those whose names contain a NAME."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

RECORDED = Path(__file__).with_name("recorded.json")


def write(path: Path, cases: dict[str, dict]) -> None:
    """Write one line per field, so that a diff shows the changed fields."""
    texts = []
    for name, held in cases.items():
        fields = [f"{json.dumps(field)}: {json.dumps(value, ensure_ascii=False)}" for field, value in held.items()]
        texts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(f" {field}" for field in fields) + "\n}")
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


def main(wanted: list[str]) -> None:
    from tests.contract.cases import CASES
    from tests.contract.running import materials, running, where

    path = Path(os.environ.get("EVOPRUNE_CONTRACT_FILE", RECORDED))
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    chosen = [name for name in CASES if not wanted or any(each in name for each in wanted)]
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        materials(Path(folder))
        for name in chosen:
            start = time.monotonic()
            with running(Path(folder)):
                held = CASES[name]()
            # As a test reads it back: without tuples, and with strings as names.
            known[name] = json.loads(json.dumps(held))
            print(f"{time.monotonic() - start:5.1f} s  {name}", file=sys.stderr)
    write(path, {"recorded with": where()} | {name: known[name] for name in CASES if name in known})


if __name__ == "__main__":
    main(sys.argv[1:])
