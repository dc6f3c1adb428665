"""Fuzzing that is led by what the code does: needs atheris. Run by `tests/fuzz/test_guided.py`, or by hand for longer.

.venv/bin/python tests/fuzz/guided.py ORIGINALS SECONDS
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["regraft.checkpoint", "safetensors", "zipfile", "pickletools"]):
    from originals import OWN
    from worker import Judge, Witness, judge

    import regraft.checkpoint


class AnyOriginal(Judge):
    """A judge of files that may have been made of any original: the fuzzer does not say of which."""

    def saved_as(self, name: str) -> list[str]:
        """Name every original that regraft wrote."""
        return list(OWN)


def main() -> None:
    assert regraft.checkpoint
    originals, seconds = Path(sys.argv[1]), sys.argv[2]
    jury, witness = AnyOriginal(originals), Witness()
    for name in sorted(path.name for path in originals.iterdir()):
        judge(originals / name, name, jury, witness)
    case = Path(tempfile.mkdtemp()) / "case.safetensors"

    def one(content: bytes) -> None:
        case.write_bytes(content)
        wrong = judge(case, "net.safetensors", jury, witness)["wrong"]
        if wrong:
            raise AssertionError(wrong)

    corpus = [str(originals)]
    options = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=60", "-artifact_prefix=fuzz-failures/"]
    atheris.Setup([sys.argv[0], *options, *corpus], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
