"""Print pip constraints that pin every direct dependency to the lowest version in its range.

PyTorch and the test tools stay as in constraints.txt: on Linux the lowest PyTorch comes only with
gigabytes of CUDA libraries.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for dependency in project["dependencies"]:
        print(re.sub(r"\[\w+\]", "", dependency).replace(">=", "==", 1))
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"(torch|pytest|pytest-xdist|hypothesis)==", line):
            print(line)


if __name__ == "__main__":
    main()
