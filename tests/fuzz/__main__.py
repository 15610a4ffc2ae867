"""`make fuzz MINUTES=2`: hypothesis feeds garbage to each target for so long; what it finds is printed, smallest first.

With ARGS="--atheris" (after `pip install atheris`) guided by coverage instead, but for the targets of the Space, which is a
process of its own.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MAX_GIGABYTES = 6
FOUND = Path("runs") / "fuzz"
INSTRUMENTED = ["sim_hf.data", "sim_hf.conversion", "sim_hf.models.sim", "sim_hf.training", "boxes", "uploads"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target")
    parser.add_argument("--targets", nargs="+", help="these only")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    options = parser.parse_args(argv)
    FOUND.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.atheris and len(options.targets or ()) == 1:
        return guided(options.targets[0], options.minutes)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_GIGABYTES * 2**30, resource.RLIM_INFINITY))
    from targets import SPACE_TARGETS, TARGETS

    if options.atheris:
        failed = [name for name in options.targets or TARGETS if guided_in_a_process(name, options.minutes)]
    else:
        failed = [name for name in options.targets or [*TARGETS, *SPACE_TARGETS] if not fuzz(name, options.minutes)]
    return int(bool(failed))


def fuzz(name: str, minutes: float) -> bool:
    """Whether nothing was found."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from mutation import mutated
    from targets import SEEDS, ready

    count, deadline = 0, 0.0

    @settings(
        max_examples=10**9, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet, phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(mutated(SEEDS[name]))
    def attack(data: bytes) -> None:
        nonlocal count
        if time.monotonic() > deadline:
            raise _Over
        count += 1
        if count % 500 == 0:
            print(f"\r{name}: {count} inputs", end="", file=sys.stderr, flush=True)
        try:
            target(data)
        except Exception:
            (FOUND / f"{name}.bin").write_bytes(data)
            raise

    try:
        with ready(name) as target:
            deadline = time.monotonic() + 60 * minutes
            attack()
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


def guided_in_a_process(name: str, minutes: float) -> int:
    """Its exit status; libFuzzer ends the process in which it runs."""
    return subprocess.call([sys.executable, __file__, "--atheris", "--targets", name, "--minutes", str(minutes)])


def guided(name: str, minutes: float) -> int:
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from targets import SEEDS, TARGETS
    corpus = FOUND / f"corpus-{name}"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-max_total_time={int(60 * minutes)}", "-max_len=20000", f"-rss_limit_mb={1000 * MAX_GIGABYTES}"]
    print(f"{name}: atheris, {minutes:g} minutes", flush=True)
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={FOUND / name}-", "-verbosity=0", str(corpus)], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
