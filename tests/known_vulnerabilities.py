"""Part of `make audit`: the pinned packages against the advisories of OSV, where these can be reached; where not, it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
_OPTIONS = ("--vulnerability-service", "osv", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def main() -> int:
    words = [sys.executable, "-m", "uv", "tool", "run", "pip-audit", "--requirement", str(REQUIREMENTS), *_OPTIONS]
    audit = subprocess.run(words, capture_output=True, text=True)
    if not audit.stdout.strip():
        reason = (audit.stderr.strip().splitlines() or [f"exit status {audit.returncode}"])[-1]
        print(f"known vulnerabilities: NOT CHECKED, as the advisories cannot be reached from here ({reason:.200})")
        return 0
    packages = json.loads(audit.stdout)["dependencies"]
    found = [(package, advisory) for package in packages for advisory in package.get("vulns", ())]
    for package, advisory in found:
        mended = ", ".join(advisory["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {mended}")
    judged = sum("skip_reason" not in package for package in packages)
    print(f"known vulnerabilities: {len(found)} in {judged} of the {len(packages)} pinned packages")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
