"""What studies and stored reports of benchmarks read, spoiled by the fuzzer.

A few cases of each by default, thousands among the slow tests.
"""

import json
import shutil
from pathlib import Path

import fuzz
import pytest
from helpers import python  # noqa: F401  (loads MLX's BLAS before the benchmarks import MLX)

pytest.importorskip("scipy.stats")

from bench import __main__ as bench
from bench import study

SEED = 16
ROOT = Path(__file__).parent.parent
PUBLISHED = sorted(
    p.parent
    for p in (ROOT / "bench" / "results").glob("*/results.json")
    if (ROOT / "bench" / "studies" / f"{p.parent.name}.toml").is_file()
)
REPORTS = sorted(
    p
    for p in (ROOT / "bench" / "results").rglob("*.json")
    if p.parent not in PUBLISHED and p.stat().st_size < 200_000
)


def study_files(random, folder):
    """A study's TOML, of which the runs are counted without training."""
    path = folder / "s.toml"
    source = random.choice(sorted((ROOT / "bench" / "studies").glob("*.toml")))
    path.write_bytes(fuzz.mutate_toml(random, source.read_text(encoding="utf-8")))
    return [str(path), "--dry-run"]


def study_results(random, folder):
    """A study's results.json, of which the report is written again."""
    chosen = min(PUBLISHED, key=lambda p: (p / "results.json").stat().st_size)
    values = json.loads((chosen / "results.json").read_bytes())
    values["runs"] = values["runs"][: random.choice((3, 20, len(values["runs"])))]
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_bytes(fuzz.mutate_json(random, values))
    toml = ROOT / "bench" / "studies" / f"{chosen.name}.toml"
    return [str(toml), "--out", str(folder / "out"), "--report-only"]


def reports(random, folder):
    """Stored rows of a benchmark, of which the report is written again."""
    source = random.choice(REPORTS)
    path = folder / source.name
    shutil.copy(source, path)
    path.write_bytes(fuzz.mutate_json(random, json.loads(path.read_bytes())))
    return ["report", str(path)]


SURFACES = {
    "study files": (study.main, study_files, 6),
    "study results": (study.main, study_results, 4),
    "bench rows": (bench.main, reports, 8),
}


@pytest.mark.parametrize("surface", SURFACES)
def test_a_few_spoiled_studies_and_reports(surface, tmp_path):
    main, spoil, cases = SURFACES[surface]
    fuzz.fuzz(main, spoil, cases, SEED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_many_spoiled_studies_and_reports(surface, fuzz_many):
    main, spoil, cases = SURFACES[surface]
    assert fuzz_many(f"bench: {surface}", main, spoil, 60 * cases)[2] > 0
