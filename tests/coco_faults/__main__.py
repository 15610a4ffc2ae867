"""`python -m coco_faults write FOLDER`"""

from __future__ import annotations

import sys

from .files import write_files


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "write":
        print("usage: python -m coco_faults write FOLDER", file=sys.stderr)
        return 2
    verdicts = write_files(arguments[1])
    print(f"{len(verdicts)} files, images/ and verdicts.json in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
