"""Known vulnerabilities of pinned packages: `python .ci/audit.py PIP_AUDIT FILE ...`, where FILE is a constraints file.

Exit code 1 where a pinned version has one. Where pip-audit or its data can't be had, that is said, and exit code 0:
then SECURITY.md says what was looked at, and when. pip-audit itself calls a package "not vulnerable" that it found
nothing about, so it is first asked about a version with a known hole.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN = "jinja2==3.1.0\n"  # CVE-2024-22195 and others
# Advisories of pinned versions that have no mended release, and why they don't reach us.
IGNORED = {"CVE-2026-95897": "dask.array.from_npy_stack unpickles what a stack's folder says of itself; never called"}


def asked(command: str, pinned: str) -> list[dict] | None:
    """pip-audit's answer for each package; None where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "pinned.txt", Path(folder) / "answer.json"
        file.write_text(pinned)
        words = [command, "--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "10"]
        try:
            subprocess.run([*words, "-r", str(file), "-f", "json", "-o", str(answer)], capture_output=True, timeout=300)
            return json.loads(answer.read_text())["dependencies"]
        except (OSError, ValueError, subprocess.SubprocessError):
            return None


def holes(answer: list[dict] | None) -> list[str]:
    return [
        f"{package['name']} {package['version']}: {hole['id']} ({', '.join(hole['aliases']) or 'no alias'}), "
        f"mended in {', '.join(hole['fix_versions']) or 'no release'}"
        for package in answer or []
        for hole in package.get("vulns", [])
        if not {hole["id"], *hole["aliases"]} & set(IGNORED)
    ]


def main(command: str, files: list[str]) -> int:
    if not holes(asked(command, KNOWN)):
        print("audit: no data of known vulnerabilities here; SECURITY.md says when they were last looked at")
        return 0
    code = 0
    for name in files:
        answer = asked(command, Path(name).read_text())
        found = holes(answer)
        unknown = [package["name"] for package in answer or [] if "vulns" not in package]
        print("".join(f"{name}: {line}\n" for line in found), end="")
        print(f"audit: {name}: {len(found)} known vulnerabilities; nothing known of {', '.join(unknown) or 'none'}")
        code |= answer is None or bool(found)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
