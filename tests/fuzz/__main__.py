"""`make fuzz MINUTES=2`: hypothesis feeds garbage to each target for so long; what it finds is printed, smallest first.

With `--atheris TARGET` (where atheris is installed) one target under coverage guidance: `--minutes` applies as well.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MAX_GIGABYTES = 6
FOUND = Path("runs") / "fuzz"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target")
    parser.add_argument("--targets", nargs="+", help="these only")
    parser.add_argument("--atheris", metavar="TARGET", help="coverage-guided, one target")
    options = parser.parse_args(argv)
    if options.atheris:
        return guided(options.atheris, options.minutes)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_GIGABYTES * 2**30, resource.RLIM_INFINITY))
    from targets import TARGETS

    failed = [name for name in options.targets or TARGETS if not fuzz(name, options.minutes)]
    return int(bool(failed))


def fuzz(name: str, minutes: float) -> bool:
    """Whether nothing was found."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from mutation import mutated
    from targets import SEEDS, TARGETS

    deadline, count = time.monotonic() + 60 * minutes, 0

    @settings(
        max_examples=10**9, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet, phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(mutated(SEEDS[name]))
    def target(data: bytes) -> None:
        nonlocal count
        if time.monotonic() > deadline:
            raise _Over
        count += 1
        if count % 500 == 0:
            print(f"\r{name}: {count} inputs", end="", file=sys.stderr, flush=True)
        try:
            TARGETS[name](data)
        except Exception:
            FOUND.mkdir(parents=True, exist_ok=True)
            (FOUND / f"{name}.bin").write_bytes(data)
            raise

    try:
        target()
    except _Over:
        print(f"\r{name}: {count} inputs in {minutes:g} minutes, nothing found", flush=True)
        return True
    except Exception as error:
        print(f"\r{name}: found after {count} inputs, kept in {FOUND / name}.bin", flush=True)
        traceback.print_exception(error)
        return False
    return True


class _Over(BaseException):
    """The time is over; no finding."""


def guided(name: str, minutes: float) -> int:
    import atheris

    with atheris.instrument_imports(include=["sim_hf.data", "boxes", "uploads", "sim_hf.training"]):
        from targets import SEEDS, TARGETS
    corpus = FOUND / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={int(60 * minutes)}", "-max_len=20000", "-rss_limit_mb=6000", str(corpus)], TARGETS[name]
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
