"""Hostile files through the public API: never code, a hang, a crash or memory; always an error of regraft or the truth.

A case that fails is kept in `fuzz-failures/`, with the command that opens it again.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hostile_pickles import CALLS, Global, Reduced, assembled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutated, read_files
from originals import write_all, zipped
from pool import Worker, kept

SHORT, LONG, MAX_LENGTH = 250, 2_500, 20_000
LONG_WORKERS = 2
FAILURES = Path("fuzz-failures")

Originals = tuple[Path, dict[str, bytes]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    folder = tmp_path_factory.mktemp("originals")
    write_all(folder)
    return folder, read_files(folder)


@pytest.fixture(scope="module")
def worker(originals: Originals, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    found = Worker(originals[0], tmp_path_factory.mktemp("cases"))
    yield found
    found.close()


def test_fuzz_originals_are_read(worker: Worker, originals: Originals) -> None:
    read = {"load", "load_weights", "diff", "diff with itself", "read_header", "inspect"}
    for name, content in originals[1].items():
        verdict = worker.judged(content, name)
        assert verdict["wrong"] == [], name
        if name == "net.safetensors":
            assert {way for way, outcome in verdict["outcomes"].items() if outcome == "read"} == read


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("writes", "opened for writing"),
        ("imports", "imported: marker"),
        ("leaves a mark", "it left its mark"),
        ("starts a process", "subprocess.Popen"),
        ("unpickles", "pickle.find_class"),
        ("grows", "took "),
        ("raises", "ZeroDivisionError"),
        pytest.param("hangs", "no answer within", marks=pytest.mark.slow),  # a new process takes its time
        pytest.param("dies", "the process died", marks=pytest.mark.slow),
    ],
)
def test_fuzz_notices_what_must_not_happen(planted: str, found: str, worker: Worker) -> None:
    wrong = worker.judged(b"", f"planted: {planted}", limit_s=3)["wrong"]
    assert any(found in one for one in wrong), wrong


def test_fuzz_finds_no_name_that_is_not_allowed_and_runs(worker: Worker, originals: Originals) -> None:
    magic = b"".join(assembled(value) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for module, name, arguments in CALLS:
        pickled = assembled({"0.bias": Reduced(Global(module, name), arguments)})
        legacy = magic + pickled + assembled([]) + struct.pack("<q", 0)
        for content in (zipped(pickled, {}), legacy, pickled):
            verdict = worker.judged(content, "zip.pt")
            assert verdict["wrong"] == [], (module, name)
            assert set(verdict["outcomes"].values()) == {"CheckpointError"}, (module, name)


def test_fuzz_hostile_files(worker: Worker, originals: Originals) -> None:
    folder, files = originals

    @settings(
        max_examples=SHORT, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        label, name, content = mutated(Random(seed), files)
        wrong = worker.judged(content, name)["wrong"]
        assert not wrong, kept(FAILURES, folder, f"{seed}: {label}", name, content, wrong)

    check()


@pytest.mark.parametrize(
    "count", [pytest.param(LONG, marks=pytest.mark.slow), pytest.param(MAX_LENGTH, marks=pytest.mark.fuzz)]
)
def test_fuzz_thousands_of_hostile_files(count: int, originals: Originals, tmp_path: Path) -> None:
    folder, files = originals

    def run(part: int) -> tuple[list[str], Counter[str], int]:
        worker = Worker(folder, tmp_path / str(part))
        failures, outcomes, peak = [], Counter[str](), 0
        try:
            for seed in range(part, count, LONG_WORKERS):
                label, name, content = mutated(Random(seed), files)
                verdict: dict[str, Any] = worker.judged(content, name)
                outcomes.update(verdict["outcomes"].values())
                outcomes["files"] += 1
                peak = max(peak, verdict["peak_bytes"])
                if verdict["wrong"]:
                    failures.append(kept(FAILURES, folder, f"{seed}: {label}", name, content, verdict["wrong"]))
        finally:
            worker.close()
        return failures, outcomes, peak

    with ThreadPoolExecutor(LONG_WORKERS) as pool:
        results = list(pool.map(run, range(LONG_WORKERS)))
    assert sum(outcomes["files"] for _, outcomes, _ in results) == count
    total = sum((outcomes for _, outcomes, _ in results), Counter[str]())
    assert total["CheckpointError"] > count  # most files are refused, in several ways each
    assert total["read"] > count // 10  # and some are still what they were
    failures = [failure for found, _, _ in results for failure in found]
    assert not failures, f"{len(failures)} of {count:,} files:\n" + "\n".join(failures[:20])
